"""Burrows' Delta: how far the frequencies of an author's commonest words lie from those of a text.

Of the most frequent words of a reference corpus each text's share is taken as a z-score over the corpus's texts; Delta
is the mean absolute difference of two texts' z-scores (Burrows 2002, "'Delta': a measure of stylistic difference").
Small is alike. It sees function words alone, which a classifier over characters need not.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trimaran.runtime.twin.report.intervals import Estimate, bootstrapped
from trimaran.runtime.twin.report.style import CannotMeasureError

MOST_WORDS: Final = 150
"""Words that are compared (Burrows 2002 has 150)."""
_SAMPLE: Final = 1000  # words of a text of the reference corpus
_FEWEST_SAMPLES: Final = 5  # of the author, and of others
_FEWEST_WORDS: Final = 500  # of all answers together
_RESAMPLES: Final = 2000
_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Delta:
    """The reference: words, their mean share and its deviation over texts, and z-scores of the author and of others.

    Attributes:
        author, others: [words].
        held_out: Delta of the author's held-out texts to the author; None where they are too short. What answers can
            reach at best.
    """

    words: tuple[str, ...]
    mean: Array
    deviation: Array
    author: Array
    others: Array
    held_out: float | None = None

    def distances(self, texts: Sequence[str], name: str) -> tuple[Estimate, Estimate]:
        """Return Delta of all texts together to the author, and to others; intervals are over texts.

        Args:
            texts: in lower case.
            name: of whose texts these are, for the random numbers.

        Raises:
            CannotMeasureError: the texts have too few words.
        """
        counts, lengths = self._counts(texts)
        if len(texts) < 2 or lengths.sum() < _FEWEST_WORDS:
            raise CannotMeasureError(
                f"Delta can't be measured: {len(texts)} texts have {int(lengths.sum())} words, and it takes 2 texts of "
                f"{_FEWEST_WORDS} together; ask for more or longer answers"
            )

        def to(target: Array) -> Estimate:
            return bootstrapped(
                len(texts), lambda weights: self._delta(weights @ counts, float(weights @ lengths), target), name,
                resamples=_RESAMPLES,
            )  # fmt: skip

        return to(self.author), to(self.others)

    def _counts(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Return of each text how often it has each word, [texts, words], and how many words it has, [texts]."""
        found = [Counter(words_of(text)) for text in texts]
        counts = np.array([[each[word] for word in self.words] for each in found], dtype=np.float64)
        return counts.reshape(len(texts), len(self.words)), np.array([sum(each.values()) for each in found], float)

    def _delta(self, counts: Array, length: float, target: Array) -> float:
        scores = (counts / max(1.0, length) - self.mean) / self.deviation
        return float(np.abs(scores - target).mean())


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; it must be in lower case already, as its language has it."""
    return _WORD.findall(text)


def reference(author: Sequence[str], others: Sequence[str], held_out: Sequence[str] = ()) -> Delta:
    """Return the reference of an author's texts and those of others, all in lower case.

    Raises:
        CannotMeasureError: there are too few words of either.
    """
    samples = [_samples(texts) for texts in (author, others)]
    for whose, group in zip(("the author", "others"), samples, strict=True):
        if len(group) < _FEWEST_SAMPLES:
            raise CannotMeasureError(
                f"Delta can't be measured: the texts of {whose} have {len(group)} times {_SAMPLE:,} words, and it "
                f"takes {_FEWEST_SAMPLES}; give more texts"
            )
    whole = Counter(word for group in samples for sample in group for word in sample)
    words = tuple(word for word, _ in sorted(whole.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS])
    shares = [np.array([_shares(sample, words) for sample in group]) for group in samples]
    both = np.concatenate(shares)
    deviation = both.std(axis=0, ddof=1)
    kept = deviation > 0
    middle, deviation = both.mean(axis=0)[kept], deviation[kept]
    profiles = [(group.mean(axis=0)[kept] - middle) / deviation for group in shares]
    found = Delta(tuple(np.array(words)[kept].tolist()), middle, deviation, *profiles)
    counts, lengths = found._counts(held_out)
    if lengths.sum() < _FEWEST_WORDS:
        return found
    distance = found._delta(counts.sum(axis=0), float(lengths.sum()), found.author)
    return Delta(found.words, found.mean, found.deviation, found.author, found.others, distance)


def _samples(texts: Sequence[str]) -> list[list[str]]:
    words = [word for text in texts for word in words_of(text)]
    return [words[start : start + _SAMPLE] for start in range(0, len(words) - _SAMPLE + 1, _SAMPLE)]


def _shares(sample: Sequence[str], words: Sequence[str]) -> list[float]:
    counts = Counter(sample)
    return [counts[word] / len(sample) for word in words]
