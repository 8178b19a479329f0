"""The best rate and batch of a model: where a loss is lowest, and power laws through the optima, with their intervals.

A best value is the lowest point of a parabola over logarithms; over sizes of the model it is a power law, which is a
line in logarithms. Every number has a 95% interval: Student's on a line, and draws of as likely parabolas for a point.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trimaran.runtime.plan.scaling.figures import (
    DRAWS,
    Array,
    Interval,
    Line,
    ScalingError,
    check_ratio,
    exp,
    interval_of,
    is_one_ratio,
)

_NEAR: Final = 4.0  # a parabola holds within this factor of the best rate
_LOST: Final = 2.0  # a run whose loss is so many times the best has come to nothing


@dataclass(frozen=True)
class PowerLaw:
    """A rate or batch as factor * N^n at one ratio of tokens to parameters, and factor * N^n * D^d at several.

    Attributes:
        exponents: of N, and of D where the runs tell it apart.
        scatter: standard deviation of the logarithm around the law.
        ratio: tokens a parameter of the runs, where they had one.
    """

    factor: Interval
    exponents: tuple[Interval, ...]
    scatter: float
    ratio: float | None
    center: Array = field(repr=False)
    _line: Array = field(repr=False)
    _spread: Array = field(repr=False)
    _quantile: float = field(repr=False)

    def predict(self, parameters: float, tokens: float) -> Interval:
        """Return the value to expect of a run, with an interval that one more optimum lies in.

        Raises ScalingError where the law says nothing of this ratio of tokens to parameters.
        """
        check_ratio(self.ratio, tokens / parameters)
        logs = np.log([parameters, tokens])[: len(self.exponents)]
        at = np.concatenate([[1.0], logs - self.center])
        value = float(at @ self._line)
        reach = self._quantile * math.sqrt(self.scatter**2 + float(at @ self._spread @ at))
        return Interval(*(float(exp(value + side * reach)) for side in (0, -1, 1)))


def fit_power_law(points: Sequence[tuple[float, float, float]]) -> PowerLaw:
    """Return the power law through (parameters, tokens, value) points, by least squares of the logarithms.

    Its intervals are Student's.

    Raises ScalingError where the points are too few.
    """
    logs = np.log(np.array(points, dtype=float).reshape(-1, 3))
    ratios = np.exp(logs[:, 1] - logs[:, 0])
    one_ratio = is_one_ratio(list(ratios))
    columns = logs[:, : 1 if one_ratio else 2]
    needed = columns.shape[1] + 2
    sizes = len(np.unique(logs[:, 0]))
    if len(points) < needed or sizes < min(needed, 3):
        raise ScalingError(
            f"a power law of {'N' if one_ratio else 'N and D'} needs {needed} optima or more for an interval, of 3 "
            f"sizes of the model, got {len(points)} of {sizes}; add rungs"
        )
    center = columns.mean(axis=0)
    line = Line(np.column_stack([np.ones(len(points)), columns - center]), logs[:, 2])
    reaches = line.quantile * np.sqrt(np.diagonal(line.spread))
    exponents = [
        Interval(float(slope), float(slope - reach), float(slope + reach))
        for slope, reach in zip(line.constants[1:], reaches[1:], strict=True)
    ]
    origin = np.concatenate([[1.0], -center])
    log_factor = float(origin @ line.constants)
    reach = line.quantile * math.sqrt(float(origin @ line.spread @ origin))
    factor = Interval(*(float(exp(log_factor + side * reach)) for side in (0, -1, 1)))
    ratio = float(np.exp(np.mean(np.log(ratios)))) if one_ratio else None
    return PowerLaw(factor, tuple(exponents), line.scatter, ratio, center, line.constants, line.spread, line.quantile)


@dataclass(frozen=True)
class Optimum:
    """The lowest point of a parabola over the logarithms of one or two values.

    Attributes:
        at: the value of each axis.
        loss: of the parabola there.
        near: the points it was fitted to: those within a factor 4 of the best one, or the nearest that are enough.
    """

    at: tuple[Interval, ...]
    loss: Interval
    near: tuple[tuple[float, ...], ...]
    center: Array = field(repr=False)
    _constants: Array = field(repr=False)

    def curve(self, *values: float) -> float:
        """Return the parabola's loss at a value of each axis."""
        columns = _parabola(np.log([values]) - self.center)
        return float((columns @ self._constants)[0])


def find_optimum(names: Sequence[str], points: Sequence[tuple[float, ...]], losses: Sequence[float]) -> Optimum:
    """Return where the loss is lowest, by a parabola over log(value), of one axis or of two.

    Args:
        names: of the axes, for errors.
        points: a value above 0 of each axis, for each loss.
        losses: infinite or NaN where training diverged; one of more than twice the best counts as that.

    Raises ScalingError where the best is at the edge of what was tried, or the points are too few or not bent.
    """
    tried = np.log(np.array(points, dtype=float).reshape(len(losses), len(names)))
    finite = np.isfinite(losses)
    if finite.any():
        finite &= np.asarray(losses) <= _LOST * np.min(np.asarray(losses)[finite])
    if not finite.any():
        raise ScalingError(f"training diverged at every {names[0]}; widen low of {names[0]}")
    logs, values = tried[finite], np.asarray(losses, dtype=float)[finite]
    center = logs[values.argmin()]
    for axis, name in enumerate(names):
        _check_edge(name, float(center[axis]), tried[:, axis])
    needed = _parabola(logs[:1]).shape[1] + 1
    distances = np.abs(logs - center).max(axis=1)
    reach = max(math.log(_NEAR) * 1.001, float(np.sort(distances)[:needed][-1]))
    near = distances <= reach
    columns = _parabola(logs[near] - center)
    if len(columns) < needed or np.linalg.matrix_rank(columns) < needed - 1:
        raise ScalingError(
            f"a parabola over {' and '.join(names)} needs {needed} points or more, at 3 values of each, "
            f"got {len(columns)} where training didn't diverge or have twice the loss; try more values"
        )
    line = Line(columns, values[near])
    drawn = line.draws(DRAWS)
    lowest, loss, bent = _lowest(line.constants[None], len(names))
    if not bent[0]:
        raise ScalingError(
            f"the loss has no lowest point over {' and '.join(names)}: it does not rise on every side of the best; "
            "widen low and high, or train longer so that its noise matters less"
        )
    for axis, name in enumerate(names):
        _check_edge(name, float(center[axis] + lowest[0, axis]), logs[:, axis], tried[:, axis])
    spots, depths, bends = _lowest(drawn, len(names))
    at = []
    for axis in range(len(names)):
        # draws without a lowest point leave the value open: half of them on either side
        open_ends = np.where(np.arange(len(bends)) % 2, tried[:, axis].min(), tried[:, axis].max()) - center[axis]
        column = np.where(bends, spots[:, axis], open_ends)
        at.append(interval_of(float(center[axis] + lowest[0, axis]), center[axis] + column, exp))
    inside = tuple(tuple(float(value) for value in row) for row in np.exp(logs[near]))
    return Optimum(tuple(at), interval_of(float(loss[0]), depths[bends], np.asarray), inside, center, line.constants)


def _check_edge(name: str, best: float, finite: Array, tried: Array | None = None) -> None:
    """Raise ScalingError unless `best` lies inside of what was tried.

    Args:
        finite: logarithms of the values to lie inside of.
        tried: those with values at which training diverged; as `finite` by default.
    """
    low, high = float(finite.min()), float(finite.max())
    beyond = finite if tried is None else tried
    for side, edge, is_out, next_one in (
        ("low", low, best <= low, beyond[beyond < low].max(initial=-math.inf)),
        ("high", high, best >= high, beyond[beyond > high].min(initial=math.inf)),
    ):
        if is_out and math.isfinite(next_one):
            raise ScalingError(
                f"the best {name} lies beyond {math.exp(edge):.4g}, and at {math.exp(next_one):.4g} training "
                "diverged or had twice the loss; try values between them"
            )
        if is_out:
            raise ScalingError(
                f"the best {name} is at the edge, {math.exp(edge):.4g} of {math.exp(low):.4g} to {math.exp(high):.4g}; "
                f"widen {side} of {name}"
            )


def _parabola(logs: Array) -> Array:
    """Return the columns of a parabola: 1, each axis, each product of two."""
    axes = list(logs.T)
    products = [a * b for a, b in itertools.combinations_with_replacement(axes, 2)]
    return np.column_stack([np.ones(len(logs)), *axes, *products])


def _lowest(constants: Array, axes: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the lowest point of each parabola, its loss, and whether it has one at all."""
    slopes = constants[:, 1 : 1 + axes]
    bends = np.zeros((len(constants), axes, axes))
    pairs = itertools.combinations_with_replacement(range(axes), 2)
    for (i, j), column in zip(pairs, constants[:, 1 + axes :].T, strict=True):
        bends[:, i, j] += column
        bends[:, j, i] += column
    is_bent = np.linalg.eigvalsh(bends)[:, 0] > 0
    safe = np.where(is_bent[:, None, None], bends, np.eye(axes))
    spots = -np.asarray(np.linalg.solve(safe, slopes[..., None]), dtype=np.float64)[..., 0]
    return spots, constants[:, 0] + 0.5 * (slopes * spots).sum(axis=1), is_bent
