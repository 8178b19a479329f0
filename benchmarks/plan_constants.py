"""Fit the planner's constants on the published runs, and measure the errors of runs that were left out of the fit.

    python -m benchmarks.plan_constants

writes runtime/plan/time/constants.json; about four minutes of one core. Folds are drawn from a fixed seed; by whole
models they are drawn by the hash of the model's name.
"""

import hashlib
from pathlib import Path

import numpy as np

from trimaran.runtime.files import write_text
from trimaran.runtime.plan.published.accuracy import calibrate, left_out_errors, of_16_bits, published_runs, shares
from trimaran.runtime.plan.time.calibrations import FILE, VERSION, Shipped

_FOLDER = Path(__file__).parents[1] / "tests" / "plan" / "published"
_FOLDS = 5


def main() -> None:
    """Fit, leave out, write."""
    runs, _ = published_runs(_FOLDER)
    default, made = calibrate(runs)
    main_runs = of_16_bits(runs)
    order = np.random.default_rng(0).permutation(len(main_runs))
    fold = {main_runs[row].line: place % _FOLDS for place, row in enumerate(order)}
    left_out = {
        "rows": left_out_errors(main_runs, lambda run: fold[run.line], _FOLDS),
        "models": left_out_errors(main_runs, lambda run: _hash(run.model) % _FOLDS, _FOLDS),
    }
    found = Shipped(
        version=VERSION,
        source="fitted on published runs, tests/plan/published, by benchmarks/plan_constants.py",
        default=default,
        calibrations=made,
        left_out={name: tuple(round(each, 4) for each in shares(errors)) for name, errors in left_out.items()},
    )
    write_text(FILE, found.model_dump_json(indent=1) + "\n")
    print(f"{len(made)} sets of constants in {FILE}; left out: {found.left_out}")


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


if __name__ == "__main__":
    main()
