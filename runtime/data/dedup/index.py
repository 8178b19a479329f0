"""The index of a run's kept documents, against which later corpora are compared: `dedup.against`.

An index is a folder of .npz files, one for each part of the corpus. Each has the keys of its documents by address, by
text and by band, their ids, and of their shingles a sketch: the 512 smallest hashes, by their upper 32 bits. The
similarity to a document of at most 512 shingles is exact; to a longer one it is estimated from the sketch, with a
standard error of at most 0.022 (bottom-k sketches: Cohen, Kaplan, "Summarizing data using bottom-k sketches", PODC
2007). The documents of an index count as earlier ones and are never removed.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup import exact, near, words
from trimaran.runtime.data.dedup.arrays import Array, Arrays, SavedArrays, Settings, window
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import UInt64Array

SKETCH: Final = 512
URLS, TEXTS = "urls", "texts"
"""Names of the arrays with the keys of `exact.url_keys` and `exact.text_keys`."""
_UInt32Array = npt.NDArray[np.uint32]


def settings(length: int = near.WORDS) -> Settings:
    """Return what two runs must have in common for their arrays to be compared."""
    return {
        "index": 1,
        "sketch": SKETCH,
        "exact_version": exact.VERSION,
        "words_version": words.VERSION,
        "near_words": length,
        "bands": f"{near.BANDS} x {near.ROWS}, {near.BANDINGS} times",
    }


def index_part(column: Callable[[str], Iterable[str]], length: int = near.WORDS) -> dict[str, Array]:
    """Return the arrays of a part's kept documents, to be saved with `settings`.

    Args:
        column: returns the `id`, `url` or `text` of every document; the text is what was compared, from before lines
            and substrings are cut.
    """
    sketches = [sketch(shingles) for shingles in near.iter_shingles(column("text"), length)]
    names = [name.encode() for name in column("id")]
    return {
        URLS: exact.url_keys(column("url")),
        TEXTS: exact.text_keys(column("text")),
        **near.band_keys(column("text"), length),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_offsets": np.cumsum([0, *map(len, names)], dtype=np.int64),
        "sketches": np.concatenate([np.zeros(0, np.uint32), *sketches]),
        "sketch_offsets": np.cumsum([0, *map(len, sketches)], dtype=np.int64),
    }


def open_index(folder: Path, length: int = near.WORDS) -> list[SavedArrays]:
    """Return the parts of an index in order.

    Raises:
        DataError: the folder has no index, or one of other settings.
    """
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder} has no index of an earlier run; name its folder of .npz files in dedup.against")
    return [SavedArrays(path, settings(length)) for path in paths]


def num_documents(part: Arrays) -> int:
    """Return how many documents a part of an index has."""
    return len(part["name_offsets"]) - 1


def names_of(part: Arrays) -> list[str]:
    """Return the ids of a part's documents."""
    content, bounds = part["names"].tobytes(), part["name_offsets"].tolist()
    return [content[start:stop].decode() for start, stop in pairwise(bounds)]


def sketch(shingles: UInt64Array) -> _UInt32Array:
    """Return the smallest of a sorted set's hashes, by their upper 32 bits: sorted, without repeats."""
    upper: _UInt32Array = np.unique((shingles >> np.uint64(32)).astype(np.uint32))
    return upper[:SKETCH]


def sketch_similarity(first: _UInt32Array, shingles: UInt64Array) -> float:
    """Return the Jaccard similarity of a set that is known by its sketch, and of one that is known whole."""
    second: _UInt32Array = np.unique((shingles >> np.uint64(32)).astype(np.uint32))
    if len(first) < SKETCH:
        return near.jaccard(first, second)
    both = np.sort(np.concatenate((first, second)))
    # Of the hashes below the sketch's end everything is known of both sets.
    union, counts = np.unique(both, return_counts=True)
    return float((counts[: len(union[:SKETCH])] == 2).mean())


class Similarity:
    """The similarity of two documents by number, of which the first is of this run.

    Args:
        index: the parts of all indexes; their documents have the first numbers.
        shingles: of this run's documents.
    """

    def __init__(self, index: Sequence[Arrays], shingles: near.Shingles) -> None:
        self._index, self._shingles = index, shingles
        self._starts = np.cumsum([0, *map(num_documents, index)], dtype=np.int64)
        self._offsets = [part["sketch_offsets"] for part in index]
        self.first_new = int(self._starts[-1])
        """Number of this run's first document."""

    def __call__(self, number: int, earlier: int) -> float:
        """Return the similarity of a document to one before it."""
        if earlier >= self.first_new:
            return self._shingles.similarity(number, earlier)
        part = int(np.searchsorted(self._starts, earlier, side="right")) - 1
        start, stop = self._offsets[part][earlier - self._starts[part] :][:2].tolist()
        return sketch_similarity(window(self._index[part], "sketches", start, stop), self._shingles[number])
