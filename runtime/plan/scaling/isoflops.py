"""IsoFLOP curves: of runs of about one compute the parabola of the loss over log N, and how its lowest point moves.

Approach 2 of Hoffmann et al. 2022, section 3.2. Runs are gathered where most of them have about one compute; a run
that is a little off is moved there along the fitted law. The best sizes are then a power law of the compute.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.scaling.figures import Interval, Run, ScalingError
from trimaran.runtime.plan.scaling.laws import FLOPS_PER_PARAMETER_AND_TOKEN
from trimaran.runtime.plan.scaling.optima import Optimum, PowerLaw, find_optimum, fit_power_law

_WIDTH: Final = 1.2  # between the least and the most compute of one curve
_FEWEST: Final = 5  # runs of a curve: a parabola's three constants and two more
_FEWEST_CURVES: Final = 3  # of a frontier with an interval
_DEVIATION: Final = 1.4826  # of a normal distribution, over its median absolute deviation
_OUTLIER: Final = 5.0  # robust deviations


@dataclass(frozen=True)
class IsoFlop:
    """Runs of about one compute.

    Attributes:
        flops: of all of them, after they were moved along the law.
        runs: at that compute.
        best: where the parabola is lowest; None where `why` says that it has no such point.
    """

    flops: float
    runs: tuple[Run, ...]
    best: Optimum | None
    why: str

    @property
    def size(self) -> Interval:
        """Parameters at the lowest point."""
        assert self.best is not None, self.why
        return self.best.at[0]


def compute_of(run: Run) -> float:
    """Return the FLOPs of a run: 6 N D."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * run.parameters * run.tokens


def outliers(runs: Sequence[Run], loss: Callable[[float, float], float]) -> list[Run]:
    """Return the runs that lie more than five robust deviations off a law, in the logarithm of the loss."""
    residuals = np.array([math.log(run.loss / loss(run.parameters, run.tokens)) for run in runs])
    middle = float(np.median(residuals))
    deviation = _DEVIATION * float(np.median(np.abs(residuals - middle)))
    return [
        run for run, each in zip(runs, residuals, strict=True) if abs(each - middle) > max(1e-9, _OUTLIER * deviation)
    ]


def isoflops(runs: Sequence[Run], loss: Callable[[float, float], float]) -> list[IsoFlop]:
    """Return the curves of the runs, by compute; none where no five runs have about one compute.

    Args:
        loss: the fitted law, of parameters and tokens.
    """
    left, found = sorted(runs, key=compute_of), []
    while left:
        group = max((_from(left, first) for first in range(len(left))), key=len)
        if len(group) < _FEWEST:
            break
        found.append(_curve(group, loss))
        left = [run for run in left if run not in group]
    return sorted(found, key=lambda each: each.flops)


def _from(runs: Sequence[Run], first: int) -> list[Run]:
    least = compute_of(runs[first])
    return [run for run in runs[first:] if compute_of(run) <= _WIDTH * least]


def _curve(group: Sequence[Run], loss: Callable[[float, float], float]) -> IsoFlop:
    flops = math.exp(float(np.mean(np.log([compute_of(run) for run in group]))))
    moved = []
    for run in group:
        tokens = flops / FLOPS_PER_PARAMETER_AND_TOKEN / run.parameters
        factor = loss(run.parameters, tokens) / loss(run.parameters, run.tokens)
        moved.append(replace(run, tokens=tokens, loss=run.loss * factor))
    try:
        best = find_optimum(["parameters"], [(run.parameters,) for run in moved], [run.loss for run in moved])
    except ScalingError as error:
        return IsoFlop(flops, tuple(moved), None, str(error))
    return IsoFlop(flops, tuple(moved), best, "")


def frontier(curves: Sequence[IsoFlop]) -> PowerLaw | None:
    """Return the best size as a power of the compute; None of fewer than three curves with a lowest point.

    `predict(flops, flops)` gives the size at a compute.
    """
    bent = [each for each in curves if each.best is not None]
    if len(bent) < _FEWEST_CURVES:
        return None
    # A law of one variable, the compute, which stands in both places that `fit_power_law` has.
    return fit_power_law([(each.flops, each.flops, each.size.value) for each in bent])
