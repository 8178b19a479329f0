"""Copies: which document is one and of which, found by equal keys over all parts, and named where they are removed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup.arrays import Arrays, window
from trimaran.runtime.data.dedup.names import Named
from trimaran.runtime.data.document import Removal
from trimaran.runtime.data.permutation import Int64Array, UInt64Array

MOST_KEYS: Final = 1 << 22
"""Keys that are compared at once, which takes about 100 bytes each of 128 bits, 60 of 64 bits: up to 400 MB."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Documents that are copies, by their numbers in the whole corpus.

    Attributes:
        numbers: [copies], ascending.
        kept: [copies], the document that each is a copy of. That one comes before it and is no copy itself.
        similarity: [copies] float32, 1 for equal ones.
    """

    numbers: Int64Array
    kept: Int64Array
    similarity: npt.NDArray[np.float32]

    def of_part(self, start: int, stop: int) -> "Copies":
        """Return those of the documents [start, stop), with `numbers` counted from `start`."""
        chosen = slice(*np.searchsorted(self.numbers, (start, stop)))
        return Copies(self.numbers[chosen] - start, self.kept[chosen], self.similarity[chosen])

    def removals(self, reason: str, names: Named) -> dict[int, Removal]:
        """Return why each is removed, by its number; `names` has the id of every kept document."""
        rows = zip(self.numbers.tolist(), self.kept.tolist(), self.similarity.tolist(), strict=True)
        return {
            number: Removal(reason, f"copy of {names[kept]}" if alike == 1 else f"{alike:.3f} like {names[kept]}")
            for number, kept, alike in rows
        }


def find_copies(parts: Sequence[Arrays], name: str, most_keys: int = MOST_KEYS) -> Copies:
    """Return the documents whose key an earlier one has.

    Args:
        parts: the arrays of every part in source order, with one key for each document (see `find_repeats`).
        name: of the array with the keys.
    """
    numbers, kept = find_repeats(parts, name, most_keys)
    return Copies(numbers, kept, np.ones(len(numbers), np.float32))


def find_repeats(parts: Sequence[Arrays], name: str, most_keys: int = MOST_KEYS) -> tuple[Int64Array, Int64Array]:
    """Return the ordinals of the keys that came before, ascending, and the ordinal of the first of each.

    Keys are looked at in shares by their leading bits, so that the memory is bounded for any number of them; the parts
    are read once for each share.

    Args:
        parts: the arrays of every part in source order; ordinals count the keys over all of them.
        name: of the array with the keys: [keys] or [keys, 2], uint64 and evenly spread. A key of zeros stands for
            nothing to compare.
        most_keys: the most to hold at once, on average.
    """
    found = [repeats_among(keys, ordinals) for keys, ordinals in iter_shares(parts, name, most_keys)]
    none = np.zeros(0, np.int64)
    repeats = np.concatenate([none, *(row[0] for row in found)])
    firsts = np.concatenate([none, *(row[1] for row in found)])
    order = np.argsort(repeats)
    return repeats[order], firsts[order]


def iter_shares(parts: Sequence[Arrays], name: str, most_keys: int) -> Iterator[tuple[UInt64Array, Int64Array]]:
    """Yield the keys of each share, [keys] or [keys, 2], and their ordinals; keys of zeros are left out."""
    sizes: list[int] = []
    held: list[UInt64Array] = []  # all of them, where they are few
    total, columns = 0, 1

    def read(part: Arrays, size: int) -> UInt64Array:
        return window(part, name, 0, size) if columns == 1 else part[name]

    for part in parts:
        held.append(part[name])
        sizes.append(len(held[-1]))
        total, columns = total + sizes[-1], held[-1].ndim
        if total > most_keys:
            held.clear()
    bits = max(0, max(0, total - 1).bit_length() - (most_keys.bit_length() - 1))
    for share in range(1 << bits):
        keys, ordinals, start = [], [], 0
        for index, size in enumerate(sizes):
            array: UInt64Array = held[index] if len(held) == len(sizes) else read(parts[index], size)
            chosen = array != 0 if array.ndim == 1 else array.any(axis=1)
            if bits:
                leading = array if array.ndim == 1 else array[:, 0]
                chosen &= leading >> np.uint64(64 - bits) == share
            places = np.flatnonzero(chosen)
            keys.append(array[places])
            ordinals.append(places + start)
            start += size
        if keys:
            yield np.concatenate(keys), np.concatenate(ordinals)


def repeats_among(keys: UInt64Array, ordinals: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the ordinals of the keys that came before, ascending, and the ordinal of the first of each.

    Args:
        keys, ordinals: in the order of the ordinals, such as a share.
    """
    order, new = sort_keys(keys)
    first_of_group = order[new][np.cumsum(new) - 1]
    repeats, firsts = ordinals[order[~new]], ordinals[first_of_group[~new]]
    order = np.argsort(repeats)
    return repeats[order], firsts[order]


def sort_keys(keys: UInt64Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Return the order that sorts keys, equal ones as they come, and for each place of it whether a new key begins."""
    columns = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort(columns.T[::-1])
    ordered = columns[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, new
