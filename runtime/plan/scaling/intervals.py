"""Intervals of what a law of the loss says is best: the percentiles over laws whose runs were drawn anew. No torch.

The errors of a law's five constants go together, so those of an optimum do not follow from theirs one by one.
`draws.json` beside this file is data: constants of the parametric bootstrap of `fit` on the 240 runs that Besiroglu et
al. 2024 fitted, written by `benchmarks/scaling_draws.py`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trimaran.runtime.files import read_text
from trimaran.runtime.plan.scaling.laws import LossFormula

if TYPE_CHECKING:
    from trimaran.runtime.plan.scaling.fit import LossLaw

FILE: Final = Path(__file__).with_name("draws.json")
_SHARE: Final = 0.95
_DIGITS: Final = 6

Draws = Sequence[LossFormula]
"""A law as each draw of its runs gives it; empty for one whose draws are not known."""


def shipped_draws() -> list[LossFormula]:
    """Return the draws of DEFAULT."""
    rows: list[list[float]] = json.loads(read_text(FILE))
    return [_formula(row) for row in rows]


def draws_of(law: "LossLaw") -> list[LossFormula]:
    """Return the draws of a fitted law over parameters and tokens."""
    import numpy as np

    (log_n,), (log_d,) = law.center
    e, a_factor, a, b_factor, b = law.draws.T
    factors = np.exp(np.clip([e, a_factor + a * log_n, b_factor + b * log_d], -690.0, 690.0))
    rows = np.column_stack([factors[0], factors[1], a, factors[2], b])
    # An exponent of 0 or below has no optimum.
    return [_formula(row.tolist()) for row in rows if row[2] > 0 and row[4] > 0]


def _formula(row: Sequence[float]) -> LossFormula:
    e, a_factor, a, b_factor, b = row
    return LossFormula("drawn", e, a_factor, a, b_factor, b, "runs that were drawn anew")


def rows_of(draws: Draws) -> list[list[float]]:
    """Return the content of `draws.json`."""
    values = ((each.e, each.a_factor, each.a, each.b_factor, each.b) for each in draws)
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in values]


def interval(draws: Draws, figure: Callable[[LossFormula], float]) -> tuple[float, float] | None:
    """Return the 95% interval of a figure of a law; None without draws."""
    found = sorted(figure(each) for each in draws)
    if not found:
        return None
    cut = round(len(found) * (1 - _SHARE) / 2)
    return found[cut], found[len(found) - 1 - cut]
