"""Constants from measured steps: the most probable ones, given a default and how far softwares are apart.

    minimize  sum over runs of rho(ln(predicted / measured) / error)  +  sum over constants of ((x - default)/spread)^2

in free coordinates (`constants.to_free`), rho that of Huber, by Levenberg and Marquardt's method. The second term keeps
a constant near its default that the runs say nothing of.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Array, Cases
from trimaran.runtime.plan.published.tables import PublishedRun
from trimaran.runtime.plan.time.constants import DEFAULT, Constants, from_free, to_free
from trimaran.runtime.plan.time.step import step_time

_ERROR: Final = 0.03  # of a step time, relative
_HUBER: Final = 2.0  # errors beyond which a run counts by its distance, not by its square
_SPREAD: Final = 0.7  # of constants between softwares, in free coordinates
_ROUNDS: Final = 60
_STEP: Final = 1e-4


class Measured:
    """Runs whose steps were timed: their cases in one array, and the fastest of each run's.

    Attributes:
        seconds: array [runs].
    """

    def __init__(self, runs: Sequence[PublishedRun]) -> None:
        self.runs = list(runs)
        self.seconds = np.array([run.seconds for run in runs], dtype=np.float64)
        self._cases = Cases.of(case for run in runs for case in run.cases)
        self._starts = np.cumsum([0, *[len(run.cases) for run in runs]])[:-1]

    def predict(self, constants: Constants) -> Array:
        """Return the seconds of a step of each run: of its fastest case."""
        return np.minimum.reduceat(step_time(self._cases, constants).total, self._starts)

    def log_errors(self, constants: Constants) -> Array:
        """Return ln(predicted / measured) of each run."""
        return np.log(self.predict(constants) / self.seconds)


def fit(measured: Measured, default: Constants = DEFAULT, spread: float = _SPREAD) -> Constants:
    """Return the most probable constants."""
    center = to_free(default)
    free, damping = center.copy(), 1e-2

    def residuals(x: Array) -> Array:
        errors = measured.log_errors(from_free(x)) / _ERROR
        far = np.maximum(np.abs(errors), _HUBER)
        huber = np.where(np.abs(errors) < _HUBER, errors, np.sign(errors) * np.sqrt(_HUBER * (2 * far - _HUBER)))
        return np.concatenate([huber, (x - center) / spread])

    now = residuals(free)
    for _ in range(_ROUNDS):
        moves = _STEP * np.eye(len(free))
        slopes = np.stack([residuals(free + each) - residuals(free - each) for each in moves], axis=1) / (2 * _STEP)
        square, downhill = slopes.T @ slopes, -slopes.T @ now
        for _ in range(8):
            move = np.clip(np.linalg.solve(square + damping * np.diag(np.diag(square)), downhill), -1.0, 1.0)
            then = residuals(free + move)
            if then @ then < now @ now:
                break
            damping *= 4
        else:
            break
        gained = now @ now - then @ then
        free, now, damping = free + move, then, max(damping / 5, 1e-7)
        if gained < 1e-6 * (now @ now):
            break
    return from_free(free)
