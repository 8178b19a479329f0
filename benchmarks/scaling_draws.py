"""Write the draws of the default scaling law, from which its optima have intervals.

    python -m benchmarks.scaling_draws

fits the 240 runs of Besiroglu et al. 2024 (tests/plan/chinchilla.csv without its five largest losses) and writes the
constants of 200 bootstrap draws into runtime/plan/scaling/draws.json; two seconds.
"""

import csv
import json
from pathlib import Path
from typing import Final

from trimaran.runtime.files import write_text
from trimaran.runtime.plan.scaling.figures import Run
from trimaran.runtime.plan.scaling.fit import LossLaw, fit_two_variables
from trimaran.runtime.plan.scaling.intervals import FILE, draws_of, rows_of
from trimaran.runtime.plan.scaling.laws import FLOPS_PER_PARAMETER_AND_TOKEN

RUNS: Final = Path(__file__).parents[1] / "tests" / "plan" / "chinchilla.csv"
_OUTLIERS: Final = 5
_DRAWS: Final = 200


def law_of_chinchilla(draws: int = _DRAWS) -> LossLaw:
    """Return the fit of the 240 runs."""
    with RUNS.open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    kept = sorted(rows, key=lambda row: row["loss"])[:-_OUTLIERS]
    runs = [
        Run(row["parameters"], row["flop"] / (FLOPS_PER_PARAMETER_AND_TOKEN * row["parameters"]), row["loss"])
        for row in kept
    ]
    return fit_two_variables(runs, 1e-3, draws)


def main() -> None:
    """Fit and write."""
    rows = rows_of(draws_of(law_of_chinchilla()))
    write_text(FILE, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} draws in {FILE}")


if __name__ == "__main__":
    main()
