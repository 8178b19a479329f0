"""Evaluation items in the corpus: a document that shares 13 words in a row with one is removed, or its paragraph is.

As in Brown et al. (GPT-3) 2020, appendix C: words in lower case and without punctuation (`dedup/words.py`), runs of 13
of them, and an item of fewer words as a whole. The fields of an item are joined in their order. Hashes find what may be
shared; the words themselves decide.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup.words import (
    Words,
    find_runs,
    find_words,
    hash_every_run,
    hash_runs,
    hash_runs_of_lengths,
)
from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import Int64Array, UInt64Array
from trimaran.runtime.data.records import read_records
from trimaran.runtime.evaluate.datasets import read_item_texts

NGRAM: Final = 13
# Bits of the filter for each run: of the words of a text that are in no item, one in 16 is looked up for nothing.
_FILTER_BITS_PER_RUN: Final = 16
_BLANK_LINES = re.compile(r"(\n[ \t\r]*\n\s*)")
_LINE_ENDS = re.compile(r"(\n\s*)")
_Read = TypeVar("_Read")


class Hit(NamedTuple):
    """An item that was found in a document.

    Attributes:
        set: the file that the item is from.
        item: its number in the file, from 1.
        document: id of the first document that has it.
        passage: the words that both have.
    """

    set: str
    item: int
    document: str
    passage: str


def read_items(path: Path, fields: Sequence[str]) -> list[str]:
    """Return the items of an evaluation set: of each record the fields, joined by spaces in their order.

    A dot in a field's name leads into a nested record; a list stands for its elements, and null for nothing.

    Args:
        path: .json, .jsonl, .csv with a row of names, .parquet, or .gz of one.

    Raises:
        DataError: the file can't be read, is of another kind, or a record has no such field.
    """
    return [
        " ".join(text for name in fields for text in _texts(_field(record, name, f"{path}, {place}")))
        for place, record in _told(lambda: read_records(path))
    ]


def read_items_of_set(name: str, folder: Path) -> list[str]:
    """Return the items of a set that evaluation knows by name: question and answers of each document.

    Raises:
        DataError: no file of the folder has it, or a record breaks a rule.
    """
    return _told(lambda: list(read_item_texts(name, folder)))


def _told(read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except DataError as error:
        raise DataError(f"decontaminate.against: {error}") from error


def _field(record: object, name: str, place: str) -> object:
    value: Any = record
    for key in (name,) if isinstance(record, dict) and name in record else name.split("."):
        if not isinstance(value, dict) or key not in value:
            has = ", ".join(map(str, record)) if isinstance(record, dict) else "no fields"
            raise DataError(f"decontaminate.against: {place} has no field {name!r}; name those of its text ({has})")
        value = value[key]
    return value


def _texts(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += reversed(list(value.values()) if isinstance(value, dict) else value)
        elif value is not None:
            yield str(value)


@dataclass(frozen=True, slots=True)
class EvaluationSets:
    """The runs of words of all evaluation sets.

    Attributes:
        names: of the sets.
        bounds: [sets + 1], the first item of each, and the number of all.
        words: of all items, without their hashes.
        length: words of a run.
        hashes: [runs], sorted.
        firsts: [runs], the first word of each.
        short: words of the items that are shorter, each number once, ascending.
        bits: a filter that says of most hashes at once that no run has them.
        openings: the same for the first words of short items, as many as the shortest has.
    """

    names: tuple[str, ...]
    bounds: Int64Array
    words: Words
    length: int
    hashes: UInt64Array
    firsts: Int64Array
    short: tuple[int, ...]
    bits: npt.NDArray[np.uint8]
    openings: npt.NDArray[np.uint8]

    @classmethod
    def of_items(cls, sets: Mapping[str, Sequence[str]], length: int = NGRAM) -> "EvaluationSets":
        """Build it from the items of each set by its name."""
        words = find_words([item for items in sets.values() for item in items])
        runs = find_runs(words, length)
        order = np.argsort(runs.hashes, kind="stable")
        hashes = runs.hashes[order]
        bounds = np.cumsum([0, *map(len, sets.values())], dtype=np.int64)
        sizes = np.diff(words.offsets)
        is_short = (sizes > 0) & (sizes < length)
        short = np.unique(sizes[is_short]).tolist()
        openings = hash_runs(words.hashes, words.offsets[:-1][is_short], short[0]) if short else hashes[:0]
        filters = _filter_of(hashes), _filter_of(openings)
        words = replace(words, hashes=words.hashes[:0])  # of no more use
        return cls(tuple(sets), bounds, words, length, hashes, runs.words[order], tuple(short), *filters)

    def shared_runs(self, words: Words) -> Iterator[tuple[int, int, list[int]]]:
        """Yield the place and the length of each run of one text that items have too, and these items, from 0 up."""
        hashes = hash_every_run(words.hashes, self.length)
        firsts = np.flatnonzero(_may_have(self.bits, hashes))
        yield from self._verified(words, firsts, np.full(len(firsts), self.length), hashes[firsts])
        if self.short:
            opened = np.flatnonzero(_may_have(self.openings, hash_every_run(words.hashes, self.short[0])))
            hashes = hash_runs_of_lengths(words.hashes, opened, self.short)
            rows, columns = np.nonzero(_may_have(self.bits, hashes))
            lengths = np.array(self.short)[rows]
            yield from self._verified(words, opened[columns], lengths, hashes[rows, columns])

    def _verified(
        self, words: Words, firsts: Int64Array, lengths: Int64Array, hashes: UInt64Array
    ) -> Iterator[tuple[int, int, list[int]]]:
        begins = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        known = np.flatnonzero(self.hashes[begins] == hashes)
        ends = np.searchsorted(self.hashes, hashes[known], "right")
        rows = zip(firsts[known].tolist(), lengths[known].tolist(), begins[known], ends, strict=True)
        for first, length, begin, end in rows:
            passage = words.passage(first, length)
            same = [run for run in self.firsts[begin:end].tolist() if self.words.passage(run, length) == passage]
            if same:
                yield first, length, (np.searchsorted(self.words.offsets, same, "right") - 1).tolist()

    def name_item(self, item: int) -> tuple[str, int]:
        """Return the set of an item, and its number there, from 1."""
        index = int(np.searchsorted(self.bounds, item, "right")) - 1
        return self.names[index], item - int(self.bounds[index]) + 1

    def table(self, hits: Iterable[Hit]) -> dict[str, dict[str, Any]]:
        """Return for each set its number of `items`, those `without_words`, the `short` ones, and the `found` ones.

        Short items are compared as a whole; below 8 words, the least of Brown et al., a match may mean little.
        `found` has one Hit for each item, the first of `hits`, in the order of the items.
        """
        sizes = np.diff(self.words.offsets)
        first: dict[tuple[str, int], Hit] = {}
        for hit in hits:
            first.setdefault((hit.set, hit.item), hit)
        rows = {}
        for name, start, stop in zip(self.names, self.bounds, self.bounds[1:], strict=False):
            own = sizes[start:stop]
            rows[name] = {
                "items": len(own),
                "without_words": int((own == 0).sum()),
                "short": int(((own > 0) & (own < self.length)).sum()),
                "found": [first[key] for key in sorted(first) if key[0] == name],
            }
        return rows


def _filter_of(hashes: UInt64Array) -> npt.NDArray[np.uint8]:
    """Return a filter that has the hashes: the upper bits of each tell a byte of it, the lowest three a bit of that."""
    size = max(10, (len(hashes) * _FILTER_BITS_PER_RUN).bit_length())
    bits = np.zeros(1 << (size - 3), np.uint8)
    np.bitwise_or.at(bits, _bytes_of(bits, hashes), _masks_of(hashes))
    return bits


def _may_have(bits: npt.NDArray[np.uint8], hashes: UInt64Array) -> npt.NDArray[np.uint8]:
    """Return 0 for each hash that the filter does not have; it may have one that is not 0."""
    return bits[_bytes_of(bits, hashes)] & _masks_of(hashes)


def _bytes_of(bits: npt.NDArray[np.uint8], hashes: UInt64Array) -> UInt64Array:
    return hashes >> np.uint64(65 - len(bits).bit_length())


def _masks_of(hashes: UInt64Array) -> npt.NDArray[np.uint8]:
    return np.uint8(1) << (hashes & np.uint64(7)).astype(np.uint8)


class Decontaminate:
    """The step that removes evaluation items, from whole documents or from paragraphs.

    `hits` has every item that was found in the documents of this part, with the first document that has it.
    """

    name = "decontaminate"

    def __init__(self, sets: EvaluationSets, action: Literal["document", "paragraph"] = "document") -> None:
        self._sets, self._action = sets, action
        self._hits: dict[int, Hit] = {}

    @property
    def hits(self) -> list[Hit]:
        """What was found, in the order of the items."""
        return [self._hits[item] for item in sorted(self._hits)]

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Remove the document, or cut its paragraphs, where it has a run of words of an item."""
        words = find_words([document.text])
        shared = []
        for first, length, items in self._sets.shared_runs(words):
            passage = words.passage(first, length)
            for item in items:
                if item not in self._hits:
                    self._hits[item] = Hit(*self._sets.name_item(item), document.id, passage)
            shared.append((first, length, items[0], passage))
        if not shared:
            return None
        _, length, item, passage = max(shared, key=lambda run: run[1])
        name, number = self._sets.name_item(item)
        reason = "decontaminate.ngram" if length == self._sets.length else "decontaminate.short_item"
        removal = Removal(reason, f"item {number} of {name}: {passage}")
        if self._action == "document":
            return removal
        return None if self._cut(document, [run[:2] for run in shared], counts) else removal

    def _cut(self, document: Document, runs: Sequence[tuple[int, int]], counts: Counts) -> bool:
        """Cut the paragraphs that a run reaches into; return whether anything is left."""
        # Paragraphs, and between them what separates them. C4's rules take out blank lines; lines are paragraphs then.
        separator = _BLANK_LINES if _BLANK_LINES.search(document.text.strip()) else _LINE_ENDS
        pieces = separator.split(document.text)
        offsets = find_words(pieces).offsets
        first, last = np.array([(first, first + length - 1) for first, length in runs]).T
        cut = np.zeros(len(pieces) + 1, np.int64)
        np.add.at(cut, np.searchsorted(offsets, first, "right") - 1, 1)
        np.add.at(cut, np.searchsorted(offsets, last, "right"), -1)
        touched = np.cumsum(cut)[:-1:2] > 0
        kept = [place for place in range(0, len(pieces), 2) if not touched[place // 2]]
        # Each paragraph that stays keeps the separator after it, unless it is now the last.
        text = "".join(piece for place in kept[:-1] for piece in pieces[place : place + 2])
        text += pieces[kept[-1]] if kept else ""
        if not text.strip():
            return False
        counts["decontaminate.paragraphs"] += int(touched.sum())
        counts["decontaminate.bytes"] += len(document.text.encode()) - len(text.encode())
        document.text = text
        return True
