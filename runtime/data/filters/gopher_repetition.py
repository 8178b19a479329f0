"""Gopher's repetition rules (Rae et al. 2021, table A1), each judged as datatrove's GopherRepetitionFilter does.

n-grams are compared by 64-bit hashes of all runs of n words, which numpy sorts: that takes a few nanoseconds a word,
where a set of Python strings takes hundreds.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.filters.words import Hashes, Words, words_of
from trimaran.runtime.spec.sections.recipe.filter import GopherRepetitionSettings

_PARAGRAPHS = re.compile(r"\n{2,}")
_TOP = (2, 3, 4)
_REPEATED = (5, 6, 7, 8, 9, 10)
_AT_ONCE: Final = 1 << 16
_MOST_RUNS: Final = 1 << 20
"""Runs that are sorted at once, of texts with fewer words of several n: numpy then works longer than Python."""


class GopherRepetitionFilter:
    """Removes texts that say the same again and again: lines, paragraphs, a frequent n-gram or repeated ones."""

    name = "gopher_repetition"

    def __init__(self, settings: GopherRepetitionSettings) -> None:
        self._settings = settings
        limits = settings.model_dump()
        self._top = {n: limits[f"max_top_{n}_gram"] for n in _TOP}
        self._repeated = {n: limits[f"max_repeated_{n}_grams"] for n in _REPEATED}

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Return the first rule that the text breaks."""
        text, limits = document.text, self._settings
        if not text:
            return None
        for what, pieces, most, most_characters in (
            ("paragraph", _paragraphs(text.strip()), limits.max_paragraphs, limits.max_paragraph_characters),
            ("line", _lines(text), limits.max_lines, limits.max_line_characters),
        ):
            number, characters = repeated(pieces)
            if most is not None and number / len(pieces) > most:
                return Removal(f"gopher_repetition.{what}s", f"{number} of {len(pieces)} {what}s, above {most:g}")
            if most_characters is not None and characters / len(text) > most_characters:
                return _removal(f"{what}_characters", characters, len(text), most_characters)
        words = words_of(text)
        return self._judge_top(words, len(text)) or self._judge_repeated(words, len(text))

    def _judge_top(self, words: Words, size: int) -> Removal | None:
        """Judge by the most frequent n-gram, the first of several."""
        most_often = words.count
        for n, most in self._top.items():
            if most is None or words.count < n:
                continue
            longest = int(words.lengths(n).max()) + n - 1
            if most_often * longest / size <= most:  # no n-gram is more frequent than its own beginning
                continue
            grams = words.grams(n)
            most_often, values = _most_frequent(grams)
            if most_often * longest / size <= most:
                continue
            first = int(np.isin(grams, values).argmax())
            characters = (int(words.lengths(n)[first]) + n - 1) * most_often
            if characters / size > most:
                return _removal(f"top_{n}_gram", characters, size, most, words.passage(first, n))
        return None

    def _judge_repeated(self, words: Words, size: int) -> Removal | None:
        checked = [(n, most) for n, most in self._repeated.items() if most is not None and words.count >= n]
        at_once = max(1, _MOST_RUNS // (words.count or 1))
        for start in range(0, len(checked), at_once):
            for n, most, places, runs in _suspects(words, size, checked[start : start + at_once]):
                characters, first = _repeated_characters(words, n, places, runs)
                if characters / size > most:
                    return _removal(f"repeated_{n}_grams", characters, size, most, words.passage(first, n))
        return None


def _paragraphs(text: str) -> list[str]:
    """Return what stands between empty lines; the pattern is slow and seldom needed."""
    return _PARAGRAPHS.split(text) if "\n\n\n" in text else text.split("\n\n")


def _lines(text: str) -> list[str]:
    """Return re.split(r"\\n+", text), which has an empty line where the text begins or ends with newlines."""
    ends = [""] * (text.startswith("\n") + text.endswith("\n"))
    return [line for line in text.split("\n") if line] + ends


def repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """Return how many pieces stand further up already, and how many characters they have."""
    different = set(pieces)
    if len(different) == len(pieces):
        return 0, 0
    return len(pieces) - len(different), sum(map(len, pieces)) - sum(map(len, different))


def _removal(rule: str, characters: int, size: int, most: float, passage: str = "") -> Removal:
    detail = f"{characters / size:.3g} of the characters, above {most:g}"
    return Removal(f"gopher_repetition.{rule}", f"{detail}: {passage}" if passage else detail)


def _most_frequent(numbers: Hashes) -> tuple[int, Hashes]:
    """Return how often the most frequent number is there, and all that are there so often."""
    ordered = np.sort(numbers)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    often = np.diff(np.append(starts, len(ordered)))
    most = int(often.max())
    return most, ordered[starts[often == most]]


def _suspects(
    words: Words, size: int, limits: Sequence[tuple[int, float]]
) -> Iterator[tuple[int, float, NDArray[np.int64], Hashes]]:
    """Yield the n whose repeated runs of n words may cover more than their share, with places and hashes of these runs.

    What repeated runs cover is never less than what is counted of them, as the first of each is covered too.
    """
    lengths = np.array([n for n, _ in limits])
    runs = words.runs_of(lengths)
    keys = (runs >> np.uint64(32)).astype(np.uint32)  # half of the bits are sorted in two thirds of the time
    ordered = np.sort(keys, axis=1)
    again = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if not len(again):
        return
    # Some runs that are there once share the upper 16 bits of others, and do no harm.
    marks = np.zeros(1 << 16, bool)
    marks[again >> np.uint32(16)] = True
    rows, places = np.divmod(np.flatnonzero(marks.take(keys >> np.uint32(16))), words.count)
    ends = np.minimum(places + lengths.take(rows), words.count)
    np.minimum(ends[:-1], places[1:], out=ends[:-1], where=rows[1:] == rows[:-1])
    covered = np.bincount(rows, words.bounds.take(ends) - words.bounds.take(places), len(limits))
    for row, (n, most) in enumerate(limits):
        if covered[row] / size > most:
            found = places[(rows == row) & (places <= words.count - n)]
            yield n, most, found, runs[row].take(found)


def _repeated_characters(words: Words, n: int, places: NDArray[np.int64], runs: Hashes) -> tuple[int, int]:
    """Return the characters of runs of n words that were met further up, from left to right, none counted twice.

    A run that is counted is passed over whole. Words are compared without the spaces between them. Returns too where
    the first such run begins. Only runs that are there twice matter, so only `places` with these are looked at.
    """
    characters, first, free = 0, 0, 0
    met: set[int] = set()
    for start in range(0, len(places), _AT_ONCE):  # Python's numbers take more memory than numpy's
        here = places[start : start + _AT_ONCE]
        lengths = (words.bounds.take(here + n) - words.bounds.take(here)).tolist()
        for place, run, length in zip(here.tolist(), runs[start : start + _AT_ONCE].tolist(), lengths, strict=True):
            if place < free:
                continue
            if run in met:
                first = first if characters else place
                characters, free = characters + length, place + n
            else:
                met.add(run)
    return characters, first
