"""Long substrings that occur twice are cut, wherever they stand; the first occurrence stays.

EXACTSUBSTR of Lee et al., "Deduplicating Training Data Makes Language Models Better", 2022, section 4.1. Suffixes that
begin with the same bytes are neighbours in a suffix array, so each run of neighbours that share that many bytes is one
substring with all its places. Of a window of `min_bytes` bytes that occurred before, those bytes are cut that are not
of the first occurrence itself. A cut never splits a character, and no match reaches over the end of a document.

For each byte of text the suffix array takes 4 bytes and the whole at most 9, the text included. A corpus too large for
that goes in groups of parts, each by itself (`plan_groups`), and a part too large in chunks of texts. A substring
whose two places lie in different groups stays, so the report must say how many groups there were.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup.names import Named
from trimaran.runtime.data.document import Counts, Removal
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.permutation import Int64Array

MEMORY_PER_BYTE: Final = 9
LEAST_BYTES: Final = 16
MOST_BYTES: Final = (1 << 16) - 1
_SEPARATOR: Final = 0xFF  # is in no UTF-8
# Of 32-bit suffix arrays.
_MOST_CONTENT: Final = (1 << 31) - 1
_BLOCK: Final = 1 << 19
_WORD: Final = 8
_WINDOWS: Final = 1 << 13
_Mask = npt.NDArray[np.bool_]


def plan_groups(sizes: Sequence[int], memory_bytes: int) -> list[list[int]]:
    """Return the parts that go together, in order: as many as fit into the memory, and at least one.

    Args:
        sizes: bytes of text of each part.
    """
    groups: list[list[int]] = []
    room = 0
    for part, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = _room(memory_bytes)
        groups[-1].append(part)
        room -= size
    return groups


class Texts:
    """Texts one after the other, each with a sign after it that is in no UTF-8."""

    def __init__(self, texts: Iterable[bytes] = ()) -> None:
        self.content, self._ends = bytearray(), array("q")
        for text in texts:
            self.add(text)

    def add(self, text: bytes) -> None:
        """Put a text at the end."""
        self.content += text
        self.content.append(_SEPARATOR)
        self._ends.append(len(self.content))

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._ends)

    @property
    def ends(self) -> Int64Array:
        """[texts]: the place after each text and its sign."""
        return np.array(self._ends, np.int64)


def chunks(texts: Iterable[bytes], memory_bytes: int) -> Iterator[Texts]:
    """Yield the texts of a group as many at a time as fit into the memory: all, unless one part alone is larger."""
    chunk, room = Texts(), _room(memory_bytes)
    for text in texts:
        if len(chunk) and len(chunk.content) - len(chunk) + len(text) > room:
            yield chunk
            chunk = Texts()
        chunk.add(text)
    yield chunk


def _room(memory_bytes: int) -> int:
    return max(0, min(memory_bytes // MEMORY_PER_BYTE, _MOST_CONTENT))


@dataclass(frozen=True, slots=True)
class Spans:
    """What is cut, in order of place.

    Attributes:
        documents: [spans], the text of the group.
        starts, ends: [spans], places in its UTF-8 bytes.
        kept: [spans], the text that has the first occurrence of the span's beginning.
    """

    documents: Int64Array
    starts: Int64Array
    ends: Int64Array
    kept: Int64Array

    def of_texts(self, start: int, stop: int) -> "Spans":
        """Return those of the texts [start, stop), with `documents` counted from `start`."""
        chosen = slice(*np.searchsorted(self.documents, (start, stop)))
        return Spans(self.documents[chosen] - start, self.starts[chosen], self.ends[chosen], self.kept[chosen])

    @staticmethod
    def of_chunks(found: Sequence["Spans"], sizes: Sequence[int]) -> "Spans":
        """Return the spans of a group of what was found in each of its chunks, which have `sizes` texts."""
        begins = np.repeat(np.cumsum([0, *sizes[:-1]], dtype=np.int64), [len(each.documents) for each in found])
        columns = [
            np.concatenate([getattr(each, name) for each in found]) for name in ("documents", "starts", "ends", "kept")
        ]
        return Spans(columns[0] + begins, columns[1], columns[2], columns[3] + begins)


def find_spans(texts: Texts, min_bytes: int) -> Spans:
    """Return the spans of a group's texts that occurred before in it.

    Args:
        texts: UTF-8, of all parts of a group in source order.
        min_bytes: bytes of a window, from LEAST_BYTES to MOST_BYTES.
    """
    require_extra("pydivsufsort")
    import pydivsufsort

    content, ends = texts.content, texts.ends
    signs = np.frombuffer(content, np.uint8)
    if len(content) < min_bytes:
        return Spans(*(np.zeros(0, np.int64) for _ in range(4)))
    suffixes = pydivsufsort.divsufsort(signs)
    same = _same_beginning(content, suffixes, ends, min_bytes)
    lengths = np.zeros(len(content), np.uint16)
    for starts, stops, _ in _cuts(suffixes, same, min_bytes):
        np.maximum.at(lengths, starts, (stops - starts).astype(np.uint16))
    starts, stops = _union(lengths)
    firsts = np.full(len(starts), len(content), np.int64)
    for window_starts, _, first in _cuts(suffixes, same, min_bytes):
        places = np.searchsorted(starts, window_starts)
        places[places == len(starts)] = 0
        found = starts[places] == window_starts
        np.minimum.at(firsts, places[found], first[found])
    starts, stops = _whole_characters(signs, starts, stops)
    wide = starts < stops
    starts, stops, firsts = starts[wide], stops[wide], firsts[wide]
    documents = np.searchsorted(ends, starts, side="right")
    begins = np.concatenate((np.zeros(1, np.int64), ends))[documents]
    return Spans(documents, starts - begins, stops - begins, np.searchsorted(ends, firsts, side="right"))


def _same_beginning(content: bytearray, suffixes: npt.NDArray[np.integer], ends: Int64Array, min_bytes: int) -> _Mask:
    """Return [suffixes]: whether a suffix and the one before it begin with the same window, inside a document."""
    words = np.ndarray((len(content) - _WORD + 1,), "<u8", content, strides=(1,))
    windows = np.ndarray((len(content) - min_bytes + 1,), f"V{min_bytes}", content, strides=(1,))
    same = np.zeros(len(suffixes), dtype=bool)
    for begin in range(1, len(suffixes), _BLOCK):
        places = suffixes[begin - 1 : begin + _BLOCK]
        fits = places <= len(content) - min_bytes
        first = words[np.where(fits, places, 0)]
        alike = np.flatnonzero((first[1:] == first[:-1]) & fits[1:] & fits[:-1])
        # Words tell most pairs apart for less than whole windows cost.
        for step in range(_WORD, min(min_bytes - _WORD, 4 * _WORD), _WORD):
            alike = alike[words[places[alike] + step] == words[places[alike + 1] + step]]
        chunks = np.split(alike, range(_WINDOWS, len(alike), _WINDOWS))
        pairs = ((chunk, windows[places[chunk]], windows[places[chunk + 1]]) for chunk in chunks)
        alike = np.concatenate([chunk[_equal(first, second, min_bytes)] for chunk, first, second in pairs])
        starts = places[alike + 1]
        inside = ends[np.searchsorted(ends, starts, side="right")] - 1 - starts >= min_bytes
        same[begin + alike[inside]] = True
    return same


def _equal(first: npt.NDArray[np.void], second: npt.NDArray[np.void], size: int) -> _Mask:
    # numpy compares bytes several times faster than what they are here: one value of no type.
    rows = [each.view(np.uint8).reshape(-1, size) for each in (first, second)]
    equal: _Mask = (rows[0] == rows[1]).all(axis=1)
    return equal


def _cuts(
    suffixes: npt.NDArray[np.integer], same: _Mask, min_bytes: int
) -> Iterator[tuple[Int64Array, Int64Array, Int64Array]]:
    """Yield for windows that occurred before, some at a time: start and end of their cut, and the first occurrence."""
    begin = 0
    while begin < len(suffixes):
        end = min(begin + _BLOCK, len(suffixes))
        while end < len(suffixes) and same[end]:  # the first occurrence is known at the end of the run
            stretch = same[end : end + _BLOCK]
            end += len(stretch) if stretch.all() else int(stretch.argmin())
        new = ~same[begin:end]
        members = np.flatnonzero(~new | np.append(~new[1:], False))
        if len(members):
            places, heads = suffixes[begin:end][members].astype(np.int64), np.flatnonzero(new[members])
            sizes = np.diff(np.append(heads, len(members)))
            first = np.repeat(np.minimum.reduceat(places, heads), sizes)
            later = places != first
            places, first = places[later], first[later]
            # The first occurrence stays whole where the next one overlaps it.
            yield np.maximum(places, first + min_bytes), places + min_bytes, first
        begin = end


def _union(lengths: npt.NDArray[np.uint16]) -> tuple[Int64Array, Int64Array]:
    """Return starts and ends of what the spans cover together; one of lengths[i] begins at i, unless it is 0."""
    starts: list[Int64Array] = [np.zeros(0, np.int64)]
    stops: list[Int64Array] = [np.zeros(0, np.int64)]
    reach = -1
    for begin in range(0, len(lengths), _BLOCK):
        places = np.flatnonzero(lengths[begin : begin + _BLOCK])
        if not len(places):
            continue
        ends = np.maximum.accumulate(places + begin + lengths[begin : begin + _BLOCK][places])
        before = np.maximum(np.concatenate(([reach], ends[:-1])), reach)
        opens = places + begin > before
        starts.append((places + begin)[opens])
        stops.append(before[opens])
        reach = max(reach, int(ends[-1]))
    # What was reached before a span opens is the end of the one before it; of the first there is none.
    last = np.full(min(1, len(starts) - 1), reach, np.int64)
    return np.concatenate(starts), np.concatenate((*stops, last))[len(last) :]


def _whole_characters(
    signs: npt.NDArray[np.uint8], starts: Int64Array, stops: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Return the spans without the characters that they split."""
    starts, stops = starts.copy(), stops.copy()
    for _ in range(3):  # continuation bytes of the longest character
        starts += (signs[starts] & 0xC0) == 0x80
        stops -= (signs[stops] & 0xC0) == 0x80
    return starts, stops


def cut_spans(texts: Iterable[bytes], spans: Spans, names: Named, counts: Counts) -> Iterator[str | Removal]:
    """Yield the texts of a part without the spans, or why nothing but white space is left of one.

    Args:
        spans: of these texts, numbered from 0 (`Spans.of_texts`).
        names: the id of every document in `spans.kept`.
        counts: spans and bytes that are cut are added as `substring.spans` and `substring.bytes`, changed texts as
            `substring.changed`.
    """
    end = 0
    for row, text in enumerate(texts):
        begin, end = end, int(np.searchsorted(spans.documents, row, side="right"))
        if begin == end:
            yield text.decode()
            continue
        starts, stops = spans.starts[begin:end].tolist(), spans.ends[begin:end].tolist()
        left = b"".join(text[a:b] for a, b in zip([0, *stops], [*starts, len(text)], strict=True)).decode()
        counts["substring.spans"] += end - begin
        counts["substring.bytes"] += sum(stops) - sum(starts)
        if left.strip():
            counts["substring.changed"] += 1
            yield left
        else:
            kept = names[int(spans.kept[begin])]
            yield Removal("substring.empty", f"all of it occurred before, its beginning in {kept}")
