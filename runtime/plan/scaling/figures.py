"""What fits of scaling laws share: runs, intervals, when runs have one ratio, and least squares on a line."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

INSTALL: Final = 'pip install "trimaran[tune]"'
DRAWS: Final = 1000
SEED: Final = 20220329  # of the bootstrap: the same runs give the same intervals
LEAST_SPREAD: Final = 1.15  # ratios of tokens to parameters nearer than this are one
_STUDENT: Final = 0.975


class ScalingError(ValueError):
    """There are too few runs, or runs of the wrong kind, for what is asked of them."""


@dataclass(frozen=True)
class Interval:
    """A number with the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"

    def covers(self, value: float) -> bool:
        """Return whether `value` lies within the bounds."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Run:
    """What a training run came to."""

    parameters: float
    tokens: float
    loss: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ScalingError(f"{name} of a run must be a number above 0 to have a logarithm, got {value:g}")

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.parameters


def is_one_ratio(ratios: Sequence[float]) -> bool:
    """Return whether the ratios of tokens to parameters are too near to each other to tell their effects apart."""
    return not ratios or max(ratios) <= LEAST_SPREAD * min(ratios)


def check_ratio(fitted: float | None, asked: float) -> None:
    """Raise ScalingError where a law that was fitted at one ratio is asked about another."""
    if fitted is not None and not is_one_ratio([fitted, asked]):
        raise ScalingError(
            f"the law was fitted at {fitted:.4g} tokens a parameter and says nothing of {asked:.4g}; "
            "fit runs of several tokens_per_parameter"
        )


@contextmanager
def scipy_is_needed() -> Iterator[None]:
    """Turn an import that fails into a sentence."""
    try:
        yield
    except ImportError as error:
        raise ScalingError("a scaling law needs the package scipy; " + INSTALL) from error


def exp(logs: Any) -> Any:
    """Return the exponentials, none of them beyond what a number can be."""
    return np.exp(np.clip(logs, -690.0, 690.0))


def interval_of(value: float, drawn: Array, of: Any) -> Interval:
    """Return `of` the value, within the bounds that 95% of the draws lie in."""
    low, high = of(np.percentile(drawn, [2.5, 97.5]))
    return Interval(float(of(value)), float(low), float(high))


class Line:
    """Least squares of what is linear in its constants.

    Attributes:
        free: points less constants.
        scatter: standard deviation of the residuals.
        spread: covariance of the constants.
        quantile: Student's, of a 95% interval.
    """

    def __init__(self, columns: Array, values: Array) -> None:
        with scipy_is_needed():
            from scipy.stats import t
        self.columns, self.free = columns, len(values) - columns.shape[1]
        self.constants = np.asarray(np.linalg.lstsq(columns, values, rcond=None)[0], dtype=np.float64)
        residuals = values - columns @ self.constants
        self.scatter = math.sqrt(float(residuals @ residuals) / self.free)
        self.spread = self.scatter**2 * np.asarray(np.linalg.inv(columns.T @ columns), dtype=np.float64)
        self.quantile = float(t.ppf(_STUDENT, self.free))

    def draws(self, count: int) -> Array:
        """Return constants as likely as those of other losses around the line, [draw, constant]."""
        random = np.random.default_rng(SEED)
        deviations = np.sqrt(self.free / random.chisquare(self.free, count))
        root = np.linalg.cholesky(self.spread + 1e-300 * np.eye(len(self.spread)))
        return np.asarray(self.constants + deviations[:, None] * (random.standard_normal((count, len(root))) @ root.T))
