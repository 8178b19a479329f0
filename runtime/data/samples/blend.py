"""Blend: from which corpus sample k of a run comes, and which of its samples it is, as pure functions of k.

The order within a corpus is the loader's. Weights are shares of samples, so of tokens; they may change in the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import lcm

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.permutation import Int64Array

_MOST_ENTRIES = 1 << 21
"""Of a table of one stage, times corpora; it takes a second."""


def chairmen(counts: Sequence[int]) -> npt.NDArray[np.int16]:
    """Return a sequence of sum(counts) corpora in which number i stands counts[i] times, as evenly as can be.

    Of the first k, corpus i has k * counts[i] / sum(counts) within 1 - 1 / (2n - 2) for n corpora: the best bound there
    is (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980).
    """
    active = [(index, count) for index, count in enumerate(counts) if count]
    period, slack = sum(counts), max(1, 2 * len(active) - 2)
    if len(active) == 1:
        return np.full(period, active[0][0], dtype=np.int16)
    order = np.empty(period, dtype=np.int16)
    owed = [0] * len(active)  # what a corpus should have had so far minus what it had, times the period
    for k in range(period):
        best, key_top, key_bottom = -1, 0, 1
        for row, (_, count) in enumerate(active):
            owed[row] += count
            if owed[row] * slack >= period:
                # How many samples it can still wait, the fewest first: (slack - 1) / slack is the most that it is owed.
                top = period * (slack - 1) - owed[row] * slack
                if best < 0 or top * key_bottom < key_top * count:
                    best, key_top, key_bottom = row, top, count
        owed[best] -= period
        order[k] = active[best][0]
    return order


def whole_counts(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the ratio of the weights.

    Exact where the weights, as they are written, allow small numbers; otherwise rounded to about a millionth.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shared = lcm(*(each.denominator for each in exact))
    scaled = [int(each * shared) for each in exact]
    divisor = int(np.gcd.reduce(np.array(scaled, dtype=object)))
    counts = [each // divisor for each in scaled]
    most = _MOST_ENTRIES // len(weights)
    if sum(counts) <= most:
        return counts
    total = sum(counts)
    return [max(1, round(each * most / total)) if each else 0 for each in counts]


@dataclass(frozen=True)
class Stage:
    """A stretch of the run with the same weights.

    Attributes:
        first: its first sample.
        weights: of each corpus, in the order of the corpora; not all 0.
    """

    first: int
    weights: tuple[float, ...]

    @cached_property
    def counts(self) -> list[int]:
        """Samples of each corpus in one period."""
        return whole_counts(self.weights)

    @property
    def period(self) -> int:
        """Samples after which the pattern begins again."""
        return sum(self.counts)

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int16], Int64Array]:
        """Of each place in a period its corpus, and how many samples of that corpus are before it."""
        order = chairmen(self.counts)
        ranks = np.empty(len(order), dtype=np.int64)
        for corpus, count in enumerate(self.counts):
            ranks[order == corpus] = np.arange(count)
        return order, ranks

    def at(self, offsets: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return of samples, counted from the first, the corpus and how many of its samples are before: [n] int64."""
        order, ranks = self._tables
        periods, places = np.divmod(offsets, self.period)
        corpora = order[places].astype(np.int64)
        return corpora, periods * np.array(self.counts, dtype=np.int64)[corpora] + ranks[places]

    def count_before(self, offset: int) -> Int64Array:
        """Return how many samples of each corpus are among the first `offset`: [corpora] int64."""
        order, _ = self._tables
        periods, rest = divmod(offset, self.period)
        part = np.bincount(order[:rest], minlength=len(self.counts)).astype(np.int64)
        return periods * np.array(self.counts, dtype=np.int64) + part


class Blend:
    """The corpora of a run in their stages."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Take the stages in order; the first begins at sample 0."""
        assert stages[0].first == 0, "the first stage begins with the run"
        self._stages = tuple(stages)
        self._firsts = np.array([stage.first for stage in stages], dtype=np.int64)
        bases = [np.zeros(len(stages[0].weights), dtype=np.int64)]
        for stage, following in pairwise(stages):
            bases.append(bases[-1] + stage.count_before(following.first - stage.first))
        self._bases = bases

    @staticmethod
    def of(weights: Mapping[str, float], stages: Sequence[tuple[int, Mapping[str, float]]], seq_len: int) -> "Blend":
        """Return the blend of named corpora.

        Args:
            weights: of every corpus, in the order of the corpora; used where there are no stages.
            stages: (tokens after which it begins, weights of some corpora, 0 for the others), the first at 0.
            seq_len: tokens of a sample; a stage begins with the first sample that begins at or after its tokens.
        """
        named = stages or [(0, weights)]
        return Blend(
            [Stage(-(-tokens // seq_len), tuple(of.get(name, 0.0) for name in weights)) for tokens, of in named]
        )

    def at(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return, of each sample of the run, its corpus and the number of the sample in that: [n] int64, [n] int64."""
        corpora, places = np.empty_like(samples), np.empty_like(samples)
        which = np.searchsorted(self._firsts, samples, side="right") - 1
        for index in np.unique(which):
            mine = which == index
            stage = self._stages[index]
            corpora[mine], before = stage.at(samples[mine] - stage.first)
            places[mine] = self._bases[index][corpora[mine]] + before
        return corpora, places

    def count_before(self, sample: int) -> Int64Array:
        """Return how many samples of each corpus are among the run's first `sample`: [corpora] int64."""
        index = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        stage = self._stages[index]
        return self._bases[index] + stage.count_before(sample - stage.first)
