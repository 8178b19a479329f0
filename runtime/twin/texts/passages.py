"""Passages of works, whole paragraphs of about 200 words, and which of them are held out of training and index.

It needs the package regex for texts with more characters than that without a space (pip install trimaran[twin]).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.texts.copies import shares_met_before, shares_with, shingles_of
from trimaran.runtime.twin.texts.work import Chapter, Left, Work

TARGET_WORDS: Final = 200
MOST_WORDS: Final = 250
"""A longer paragraph is cut at its lines, else at its sentences, else between words, else between characters."""
HELD_OUT_SHARE: Final = 0.1
_LARGEST_WORK: Final = 0.25
"""Share of all characters above which a work is not held out as a whole: too little would be left to learn from."""
COPY_SHARE: Final = 0.8
"""Of a passage's five-word shingles that earlier passages have, for it to be a copy and left out."""
LEAK_SHARE: Final = 0.2
"""Of a passage's five-word shingles that a held-out one has, for it to leave training: 40 of its 200 words."""
_LONGEST_WORD: Final = 16
"""Letters, signs or spaces in a row that count as a word, so that a text without spaces is not one."""
_WINDOW: Final = 256
_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\u2600-\u27bf\U0001f000-\U0001faff]"
    rf"|[^\W_]{{1,{_LONGEST_WORD}}}(?:['’][^\W_]{{1,{_LONGEST_WORD}}}){{0,2}}"
    rf"|(?:[^\w\s]|_){{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}"
)
_SENTENCE_END: Final = re.compile(r"(?<=[.!?…。！？])[\"'”’»)\]]*\s+|(?<=[。！？])")
_LINE_END: Final = re.compile(r"\n")
_SPACE: Final = re.compile(r"\s+")
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Passages:
    """The passages of an author and how some came to be held out.

    Args:
        passages: numbered from 0.
        held_out: what was held out, for a reader: names of works, or of chapters of the one work.
        how: `works`, `chapters`, `end` (the last tenth of a text without chapters) or `nothing` (of a single passage).
        left: passages that are left out as copies, and those that left training for the held-out part.
    """

    passages: tuple[Passage, ...]
    held_out: tuple[str, ...]
    how: str
    left: tuple[Left, ...]


def make_passages(works: Sequence[Work], language: str) -> Passages:
    """Return the passages of works, about a tenth of the text held out, by hashes: the same for the same texts.

    Whole works are held out where some are no larger than a quarter of all, else whole chapters, else the end of the
    text. A passage that shares a fifth of its shingles with a held-out one is held out with it, so that nothing of
    it is trained on or found; a passage that is a copy of an earlier one is left out.

    Args:
        language: ISO 639-1 code.
    """
    found = list[Passage]()
    chapter_of = list[tuple[int, int]]()
    for work in works:
        line, at = 1, 0
        for number, chapter in enumerate(work.chapters):
            for start, end in _cut(work.text, chapter):
                line, at = line + work.text.count("\n", at, start), start
                found.append(_passage(len(found), work, chapter, start, end, line))
                chapter_of.append((work.number, number))
    how, is_held, names = _choose(works, found, chapter_of)
    sets = shingles_of([each.text for each in found], language)
    held_out = [each for each, is_out in zip(sets, is_held, strict=True) if is_out]
    leaks = (np.array(shares_with(sets, held_out)) >= LEAK_SHARE) & ~is_held
    # Held-out passages first: of a passage and its copy that is the one that stays.
    order = np.argsort(~is_held, kind="stable")
    is_copy = np.zeros(len(found), bool)
    is_copy[order] = shares_met_before([sets[place] for place in order]) >= COPY_SHARE
    left = [*_left(found, is_copy, "passage.copy"), *_left(found, leaks & ~is_copy, "passage.like_held_out")]
    stay = [
        replace(found[place], is_held_out=bool((is_held | leaks)[place])) for place in np.flatnonzero(~is_copy).tolist()
    ]
    return Passages(tuple(replace(each, id=place) for place, each in enumerate(stay)), names, how, tuple(left))


def _left(found: Sequence[Passage], which: BoolArray, reason: str) -> list[Left]:
    times, characters = Counter[str](), Counter[str]()
    for place in np.flatnonzero(which).tolist():
        times[found[place].file] += 1
        characters[found[place].file] += len(found[place].text)
    return [Left(file, reason, "", count, characters[file]) for file, count in times.items()]


def _choose(
    works: Sequence[Work], found: Sequence[Passage], chapter_of: Sequence[tuple[int, int]]
) -> tuple[str, BoolArray, tuple[str, ...]]:
    """Return how passages are held out, which, and the names of what is."""
    total = sum(len(each.text) for each in found)
    sizes = {work.number: len(work.text) for work in works}
    small = {str(number): size for number, size in sizes.items() if size <= _LARGEST_WORK * sum(sizes.values())}
    if small:
        chosen = _draw(small, {str(work.number): work.text for work in works}, total)
        names = tuple(f"{work.title} ({work.file})" for work in works if str(work.number) in chosen)
        return "works", np.array([str(work) in chosen for work, _ in chapter_of], dtype=bool), names
    chapters = {
        f"{work.number}.{place}": work.text[chapter.start : chapter.end]
        for work in works
        for place, chapter in enumerate(work.chapters)
    }
    small = {name: len(text) for name, text in chapters.items() if len(text) <= _LARGEST_WORK * total}
    if small:
        chosen = _draw(small, chapters, total)
        titles = {
            f"{w.number}.{place}": f"{w.title}: {each.title}" for w in works for place, each in enumerate(w.chapters)
        }
        is_held = np.array([f"{work}.{chapter}" in chosen for work, chapter in chapter_of], dtype=bool)
        return "chapters", is_held, tuple(titles[name] for name in chapters if name in chosen)
    ends = np.cumsum([len(each.text) for each in found])
    is_held = ends > (1 - HELD_OUT_SHARE) * total if len(found) > 1 else np.zeros(len(found), bool)
    if not is_held.any():
        return "nothing", is_held, ()
    return "end", is_held, (f"the last {int(is_held.sum())} of {len(found)} passages",)


def _draw(sizes: Mapping[str, int], texts: Mapping[str, str], total: int) -> set[str]:
    """Return names in the order of their texts' hashes, until they have HELD_OUT_SHARE of all characters; at least one.

    One that would make it more than double that is passed over where another will do.
    """
    order = sorted(sizes, key=lambda name: hashlib.sha256(texts[name].encode()).hexdigest())
    chosen, size = set[str](), 0
    for name in order:
        if size >= HELD_OUT_SHARE * total:
            break
        if size + sizes[name] <= 2 * HELD_OUT_SHARE * total:
            chosen.add(name)
            size += sizes[name]
    return chosen or {min(order, key=lambda name: sizes[name])}


def _passage(number: int, work: Work, chapter: Chapter, start: int, end: int, first: int) -> Passage:
    text = work.text[start:end]
    return Passage(
        number,
        work.number,
        work.file,
        work.title,
        chapter.title,
        start,
        end,
        first,
        first + text.count("\n"),
        text,
        False,
    )


def count_words(text: str) -> int:
    """Return the words of a text; an ideograph or emoji is one, and so are _LONGEST_WORD letters or signs."""
    return sum(1 for _ in _WORD.finditer(text))


def _cut(text: str, chapter: Chapter) -> Iterator[tuple[int, int]]:
    """Yield the ends of a chapter's passages: as many as make them about TARGET_WORDS, cut where paragraphs end."""
    pieces = [piece for paragraph in _paragraphs(text, chapter) for piece in _within(text, *paragraph)]
    words = np.cumsum([count_words(text[start:end]) for start, end in pieces])
    if not len(pieces):
        return
    count = max(1, round(float(words[-1]) / TARGET_WORDS))
    targets = words[-1] * np.arange(1, count) / count
    # The piece whose end is nearest to each target; pieces that are long may be nearest to several.
    after = np.searchsorted(words, targets)
    before = np.searchsorted(words, words[np.maximum(after - 1, 0)])
    cuts = np.unique(np.where(targets - words[before] <= words[after] - targets, before, after) + 1).tolist()
    for first, after in pairwise([0, *(cut for cut in cuts if cut < len(pieces)), len(pieces)]):
        yield pieces[first][0], pieces[after - 1][1]


def _paragraphs(text: str, chapter: Chapter) -> Iterator[tuple[int, int]]:
    at = chapter.start
    for paragraph in text[chapter.start : chapter.end].split("\n\n"):
        if paragraph.strip():
            yield at, at + len(paragraph)
        at += len(paragraph) + 2


def _within(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return a paragraph whole, or its parts of at most MOST_WORDS where it is longer."""
    if count_words(text[start:end]) <= MOST_WORDS:
        return [(start, end)]
    for pattern in (_LINE_END, _SENTENCE_END, _SPACE):
        parts = _parts(text, start, end, pattern)
        if len(parts) > 1:
            return [piece for part in parts for piece in _within(text, *part)]
    return _between_characters(text, start, end)


def _between_characters(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a text without spaces; what is read as one character stays whole (Unicode, UAX 29)."""
    require_extra("regex", extra="twin")
    import regex

    pieces, at, size = list[tuple[int, int]](), start, _WINDOW
    while at < end:
        # The engine looks back over a whole row of flags for each of them, so it sees no more of it than a window.
        stop = min(end, at + size)
        found = regex.finditer(rf"\X{{1,{_LONGEST_WORD}}}", text[at:stop])
        new = [(at + each.start(), at + each.end()) for each in found]
        if stop < end:
            new.pop()  # it may go on
        pieces += new
        at, size = (new[-1][1], _WINDOW) if new else (at, 2 * size)
    return _together(text, pieces)


def _parts(text: str, start: int, end: int, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return the parts between matches, as long as `_together` makes them."""
    edges, at = list[tuple[int, int]](), start
    for match in pattern.finditer(text, start, end):
        if at < match.start() and match.end() < end:
            edges.append((at, match.start()))
            at = match.end()
    return _together(text, [*edges, (at, end)])


def _together(text: str, edges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return parts of a text, put together up to TARGET_WORDS."""
    parts, words = [edges[0]], count_words(text[slice(*edges[0])])
    for first, last in edges[1:]:
        more = count_words(text[first:last])
        if words + more <= TARGET_WORDS:
            parts[-1], words = (parts[-1][0], last), words + more
        else:
            parts.append((first, last))
            words = more
    return parts
