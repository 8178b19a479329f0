"""95% intervals of shares and of means over answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trimaran.runtime.evaluate.bootstrap import RESAMPLES, generator_of

_Z: Final = 1.959964
"""Of the normal distribution, both tails of 5%."""
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval.

    Args:
        count: of what it was measured on.
    """

    value: float
    low: float
    high: float
    count: int

    def lies_apart_from(self, other: "Estimate") -> bool:
        """Whether the two intervals have nothing in common."""
        return self.high < other.low or other.high < self.low


def share(hits: int, count: int) -> Estimate:
    """Return the share of hits, with Wilson's score interval (Wilson 1927), which holds for few and for no hits too.

    Raises:
        ValueError: there is nothing to take a share of.
    """
    if count < 1 or not 0 <= hits <= count:
        raise ValueError(f"{hits} of {count} is no share")
    rate, square = hits / count, _Z**2
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    return Estimate(rate, max(0.0, middle - half), min(1.0, middle + half), count)


def bootstrapped(
    items: int, figure: Callable[[Array], float], name: str, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return a figure of items, with the standard interval: 1.96 deviations of what it is of items drawn anew.

    Drawn with replacement there are fewer different items, so that a sum of absolute values comes out larger than of
    the items themselves, and percentiles would not hold the figure (Efron and Tibshirani 1993, sections 10.2, 12.2).

    Args:
        items: how many there are, at least two.
        figure: of the weights [items] of each of them: how often it was drawn.
        name: of the figure, for the random numbers.

    Raises:
        ValueError: there are fewer than two items.
    """
    if items < 2:
        raise ValueError(f"an interval is of at least 2 answers, and there are {items}")
    generator = generator_of(seed, name)
    whole = figure(np.ones(items))
    drawn = [figure(generator.multinomial(items, np.full(items, 1 / items)).astype(float)) for _ in range(resamples)]
    half = _Z * float(np.std(drawn, ddof=1))
    return Estimate(whole, whole - half, whole + half, items)


def mean(values: Sequence[float], name: str, seed: int = 0) -> Estimate:
    """Return the mean of values, one of each answer, with its bootstrap interval.

    Raises:
        ValueError: there are fewer than two.
    """
    array = np.array(values, dtype=np.float64)
    return bootstrapped(len(array), lambda weights: float(weights @ array / weights.sum()), name, seed)
