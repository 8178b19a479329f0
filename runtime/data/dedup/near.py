"""Near copies: MinHash finds documents that may be alike, and the exact Jaccard similarity of their shingles decides.

A document is a set of shingles, its runs of five words (Broder, "On the resemblance and containment of documents",
1997). Five words, 112 hashes and 14 bands of 8 are those of FineWeb (Penedo et al. 2024). Such bands find a pair of
similarity s with probability 1 - (1 - s^8)^14: 0.77 at 0.75, 0.92 at 0.8. The same hashes are therefore banded three
times more, so that each of the further 42 bands has its 8 hashes from 8 bands of the first: 0.99 at 0.75 and more than
0.999 at 0.8, measured, and no more hashing. Whatever is found is verified, so more bands take no other documents.

What is removed: in source order, a document goes if one that was *kept* before is alike, by at least the threshold. So
each removed document has a kept one that is that similar to it, and no two found to be alike are both kept. Clusters
by transitive closure (union-find) would remove more: of three documents where the second is like the first and the
third like the second, the third too, however far from the first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from trimaran.runtime.data.dedup.arrays import Array, Arrays, window
from trimaran.runtime.data.dedup.copies import MOST_KEYS, Copies, iter_shares, sort_keys
from trimaran.runtime.data.dedup.words import find_runs, find_words
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.permutation import Int64Array, UInt64Array, mix64

BANDS: Final = 14
ROWS: Final = 8
WORDS: Final = 5
_HASHES = BANDS * ROWS
_GRID = np.arange(_HASHES).reshape(BANDS, ROWS)
BANDINGS: Final = 4
# Row r of band b of banding k is hash r of the first banding's band b + k r: any two bands share two hashes at most.
_BANDS = [
    _GRID[(band + banding * np.arange(ROWS)) % BANDS, np.arange(ROWS)]
    for banding in range(BANDINGS)
    for band in range(BANDS)
]
BAND_NAMES: Final = tuple(f"band{band:02}" for band in range(len(_BANDS)))
"""Names of the arrays of `band_keys`."""
_SEED = 42
_BATCH_CHARACTERS = 1 << 21
_HELD_SHINGLES = 1 << 21
MOST_COMPARED: Final = 256
"""Pages of one frame can share a bucket without being alike: so many kept ones is a document compared with."""


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def band_keys(texts: Iterable[str], length: int = WORDS) -> dict[str, UInt64Array]:
    """Return for each band the keys of a part's texts, [texts]; 0 for a text without a word.

    A text of fewer than `length` words is one shingle of all of them.
    """
    require_extra("rensa")
    import rensa

    keys = [np.zeros((0, len(_BANDS)), np.uint64)]
    for batch in _batches(texts):
        runs = find_runs(find_words(batch), length)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(runs.hashes, runs.offsets, _HASHES, _SEED)
        signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(batch), _HASHES)
        keys.append(_keys_of(signatures) * (np.diff(runs.offsets) > 0)[:, None])
    return dict(zip(BAND_NAMES, np.ascontiguousarray(np.concatenate(keys).T), strict=True))


def _keys_of(signatures: UInt64Array) -> UInt64Array:
    """Return [texts, bands] for [texts, hashes]; never 0."""
    keys = np.zeros((len(signatures), len(_BANDS)), np.uint64)
    for row in np.array(_BANDS).T:
        keys = mix64(keys ^ signatures[:, row])
    return np.maximum(keys, 1)


def iter_shingles(texts: Iterable[str], length: int = WORDS) -> Iterator[UInt64Array]:
    """Yield the shingles of each text: their hashes, sorted and without repeats."""
    for batch in _batches(texts):
        runs = find_runs(find_words(batch), length)
        for start, stop in pairwise(runs.offsets.tolist()):
            yield np.unique(runs.hashes[start:stop])


def shingle_sets(texts: Iterable[str], chosen: Sequence[int], length: int = WORDS) -> dict[str, Array]:
    """Return the shingles of the chosen texts of a part, for `Shingles`.

    Args:
        chosen: rows of the texts, ascending.

    Returns:
        `rows`: [chosen]; `offsets`: [chosen + 1]; `shingles`: their hashes, sorted and without repeats for each.
    """
    wanted = set(chosen)
    sets = [np.zeros(0, np.uint64), *iter_shingles((t for row, t in enumerate(texts) if row in wanted), length)]
    offsets = np.cumsum([len(each) for each in sets], dtype=np.int64)
    return {"rows": np.array(chosen, dtype=np.int64), "offsets": offsets, "shingles": np.concatenate(sets)}


def find_buckets(parts: Sequence[Arrays], band: str, most_keys: int = MOST_KEYS) -> dict[str, Array]:
    """Return the documents that share a key of a band with another.

    Args:
        parts: the arrays of every part in source order, with keys from `band_keys`.
        band: one of BAND_NAMES.

    Returns:
        `numbers`: [entries], the documents, ascending, each at most once; `buckets`: [entries], from 0 up, equal for
        documents with the same key.
    """
    numbers, buckets, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for keys, ordinals in iter_shares(parts, band, most_keys):
        order, new = sort_keys(keys)
        shared = ~new
        shared[:-1] |= ~new[1:]
        numbers.append(ordinals[order[shared]])
        buckets.append(np.cumsum(new[shared]) - 1 + count)
        count += int(new[shared].sum())
    joined = np.concatenate(numbers)
    order = np.argsort(joined)
    return {"numbers": joined[order], "buckets": np.concatenate(buckets)[order]}


def sharing_documents(bands: Sequence[Arrays]) -> Int64Array:
    """Return the documents that are in any bucket, ascending: those whose shingles are wanted."""
    found = np.zeros(0, dtype=bool)
    for band in bands:
        numbers = band["numbers"]
        found = np.pad(found, (0, max(0, int(numbers.max(initial=-1)) + 1 - len(found))))
        found[numbers] = True
    return np.flatnonzero(found)


class Shingles:
    """The shingle sets of documents by number, read from the parts' arrays when they are asked for.

    Args:
        parts: what `shingle_sets` returned for every part, or None for a part without any.
        starts: number of the first document of each part.
    """

    def __init__(self, parts: Sequence[Arrays | None], starts: Sequence[int]) -> None:
        self._parts = parts
        rows = [part["rows"] + start for part, start in zip(parts, starts, strict=True) if part is not None]
        self._numbers = np.concatenate([np.zeros(0, np.int64), *rows])
        self._from = np.repeat(np.arange(len(parts)), [0 if part is None else len(part["rows"]) for part in parts])
        offsets = [part["offsets"] for part in parts if part is not None]
        self._begins = np.concatenate([np.zeros(0, np.int64), *(each[:-1] for each in offsets)])
        self._ends = np.concatenate([np.zeros(0, np.int64), *(each[1:] for each in offsets)])
        self._held: OrderedDict[int, UInt64Array] = OrderedDict()
        self._held_shingles = 0

    def __getitem__(self, number: int) -> UInt64Array:
        """Return a document's shingles, sorted."""
        if number not in self._held:
            place = int(np.searchsorted(self._numbers, number))
            if place == len(self._numbers) or self._numbers[place] != number:
                raise KeyError(number)
            part = self._parts[self._from[place]]
            assert part is not None
            self._held[number] = window(part, "shingles", int(self._begins[place]), int(self._ends[place]))
            self._held_shingles += len(self._held[number])
            while self._held_shingles > _HELD_SHINGLES and len(self._held) > 1:
                self._held_shingles -= len(self._held.popitem(last=False)[1])
        self._held.move_to_end(number)
        return self._held[number]

    def similarity(self, first: int, second: int) -> float:
        """Return the Jaccard similarity of two documents."""
        return jaccard(self[first], self[second])


def jaccard(first: Array, second: Array) -> float:
    """Return the share of the elements that both sets have; each is sorted and without repeats."""
    both = np.concatenate((first, second))
    both.sort(kind="stable")  # of two sorted halves: merges them
    common = int((both[1:] == both[:-1]).sum())
    return common / (len(both) - common) if len(both) else 0.0


@dataclass(frozen=True, slots=True)
class NearCopies:
    """Near copies, and how much was compared.

    Attributes:
        copies: with the similarity of each to the document that is kept for it.
        compared: pairs whose similarity was computed.
        cut_short: documents that shared buckets with more kept ones than MOST_COMPARED, and were compared with these.
    """

    copies: Copies
    compared: int
    cut_short: int


def find_near_copies(
    bands: Sequence[Arrays], similarity: Callable[[int, int], float], threshold: float, first_new: int = 0
) -> NearCopies:
    """Return the documents that are like one that is kept.

    Args:
        bands: from `find_buckets`, of every band.
        similarity: of two documents by number, such as `Shingles.similarity`.
        threshold: the least similarity of a copy.
        first_new: documents below this number are of earlier runs: they are kept, and not compared with each other.
    """
    numbers = sharing_documents(bands)
    kept = _Kept(bands, numbers)
    removed, originals, similarities = array("q"), array("q"), array("f")
    compared = cut_short = 0
    for index in range(len(numbers)):
        number = int(numbers[index])
        candidates = kept.candidates(index) if number >= first_new else []
        cut_short += len(candidates) > MOST_COMPARED
        for candidate in candidates[:MOST_COMPARED]:
            compared += 1
            original = int(numbers[candidate])
            alike = similarity(number, original)
            if alike >= threshold:
                removed.append(number)
                originals.append(original)
                similarities.append(alike)
                break
        else:
            kept.add(index)
    copies = Copies(np.array(removed, np.int64), np.array(originals, np.int64), np.array(similarities, np.float32))
    return NearCopies(copies, compared, cut_short)


class _Kept:
    """The kept documents of every bucket: lists that are linked in arrays, 8 bytes for each document of a bucket."""

    def __init__(self, bands: Sequence[Arrays], numbers: Int64Array) -> None:
        counts = np.zeros(len(numbers), np.int64)
        for band in bands:
            counts[np.searchsorted(numbers, band["numbers"])] += 1
        # The entries of document i are [offsets[i], offsets[i + 1]), one for each of its buckets.
        self._offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        self._buckets = np.empty(self._offsets[-1], np.int32)
        free, first = self._offsets[:-1].copy(), 0
        for band in bands:
            places = np.searchsorted(numbers, band["numbers"])
            self._buckets[free[places]] = band["buckets"] + first
            free[places] += 1
            first += int(band["buckets"].max(initial=-1)) + 1
        self._last = np.full(first, -1, np.int32)
        self._before = np.full(len(self._buckets), -1, np.int32)

    def add(self, index: int) -> None:
        """Put a document at the end of the lists of its buckets."""
        start, stop = self._offsets[index : index + 2]
        own = self._buckets[start:stop]
        self._before[start:stop] = self._last[own]
        self._last[own] = np.arange(start, stop)

    def candidates(self, index: int) -> list[int]:
        """Return the kept documents in the buckets of one, those of most buckets first, then those that came first.

        Of each bucket the last MOST_COMPARED and one more are seen.
        """
        start, stop = self._offsets[index : index + 2]
        met: list[Int64Array] = []
        entries = self._last[self._buckets[start:stop]]
        while len(entries := entries[entries >= 0]) and len(met) <= MOST_COMPARED:
            met.append(np.searchsorted(self._offsets, entries, side="right") - 1)
            entries = self._before[entries]
        if not met:
            return []
        documents, counts = np.unique(np.concatenate(met), return_counts=True)
        found: list[int] = documents[np.lexsort((documents, -counts))].tolist()
        return found
