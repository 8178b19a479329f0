"""The bootstrap: figures of tasks from the values of their documents, drawn anew with replacement many times.

A document's value is a number, of which a task's figure is the mean, or (sum, weight), of which it is the ratio of sums
(log-likelihood and words). Drawn documents give the figure's distribution (Efron and Tibshirani 1993, chapter 6).
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

RESAMPLES: Final = 10_000
_AT_ONCE: Final = 1 << 20  # documents drawn at once: with their values 40 MiB
_FEW: Final = 64  # different values, of which it is quicker to draw how often each comes
_PERPLEXITIES: Final = frozenset({"perplexity", "token_perplexity", "word_perplexity", "byte_perplexity"})
Array = np.ndarray[Any, np.dtype[np.float64]]


def standard_error(metric: str, values: Sequence[Any], resamples: int = RESAMPLES) -> float | str:
    """Return the standard error of a figure by the bootstrap, "N/A" (as lm-eval has it) for a single document."""
    if len(values) < 2:
        return "N/A"
    drawn = resampled(as_pairs(values), generator_of(0, metric), resamples)
    return float(np.std(transformed(metric, drawn[:, 0] / drawn[:, 1]), ddof=1))


def as_pairs(values: Sequence[Any]) -> Array:
    """Return [documents, 2]: what is summed, and its weight."""
    return np.array([value if isinstance(value, list | tuple) else (value, 1.0) for value in values], dtype=np.float64)


def transformed(metric: str, ratio: Any) -> Any:
    """Return the figure for a ratio of sums; log-likelihoods are summed for the measures of texts."""
    if metric in _PERPLEXITIES:
        with np.errstate(over="ignore"):
            return np.exp(-ratio)
    if metric == "nats_per_token":
        return -ratio
    return -ratio / math.log(2) if metric.startswith("bits_per_") else ratio


def interval_of(differences: Array) -> tuple[float, float]:
    """Return the 95% interval: the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def resampled(values: Array, generator: np.random.Generator, resamples: int) -> Array:
    """Return the sums over documents drawn with replacement, [resamples, columns]."""
    count = len(values)
    different, times = np.unique(values, axis=0, return_counts=True)
    if len(different) <= _FEW:
        found: Array = generator.multinomial(count, times / count, size=resamples) @ different
        return found
    step = max(1, _AT_ONCE // count)
    return np.concatenate(
        [
            values[generator.integers(count, size=(min(step, resamples - start), count))].sum(axis=1)
            for start in range(0, resamples, step)
        ]
    )


def generator_of(seed: int, name: str) -> np.random.Generator:
    """Return the generator of a figure, which does not depend on what else is compared."""
    return np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()[:8]])
