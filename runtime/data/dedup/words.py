"""Words of many texts at once, as 64-bit hashes, and the hashes of n words in a row. numpy alone, no loop over words.

A word is a run of letters, digits and combining marks, in lower case and normal form C. Apostrophes, soft hyphens,
joiners and variation selectors are dropped (don't is dont), and every other sign ends a word. Each ideograph or kana is
a word of its own, because Chinese and Japanese are written without spaces.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.permutation import Int64Array, UInt64Array, mix64

VERSION: Final = 1
"""Of the hashes: it changes with the definition of a word, and saved arrays of another version are refused."""

# Longer words (a line of base64) are hashed one by one.
_BLOCK_BYTES = 8
_MOST_BLOCKS = 8
_MASKS = np.array([(1 << (8 * size)) - 1 for size in range(_BLOCK_BYTES + 1)], dtype=np.uint64)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# Bytes of UTF-8 above 127 are parts of signs that `_sign_map` has let stand.
_LOWER = bytes(
    ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else byte if byte >= 128 else 32 for byte in range(256)
)
_SPACE, _DROPPED = ord(" "), ord("'")
_DROPPED_TOO = (0xAD, 0x2BC, 0x200C, 0x200D, 0x2019, *range(0xFE00, 0xFE10))
# No letter is assigned above: Unicode 17 ends its third plane of ideographs at U+33479.
_LAST_LETTER = 0x34000
_FIRST_IDEOGRAPH = 0x3040
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U00033fff])")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of some texts, one after the other.

    Attributes:
        content: the words, in UTF-8, with spaces between them.
        starts, ends: [words], the places of each in `content`.
        hashes: [words].
        offsets: [texts + 1], the first word of each text, and the number of all.
    """

    content: bytes
    starts: Int64Array
    ends: Int64Array
    hashes: UInt64Array
    offsets: Int64Array

    def passage(self, first: int, count: int) -> str:
        """Return some words in a row, with single spaces between them."""
        return b" ".join(
            self.content[start:end]
            for start, end in zip(self.starts[first : first + count], self.ends[first : first + count], strict=True)
        ).decode()


def find_words(texts: Sequence[str]) -> Words:
    """Return the words of each text and their hashes."""
    plain = [_plain(text) for text in texts]
    # Words are read by blocks of 8 bytes, beyond their ends too.
    content = b" ".join([*plain, b" " * _BLOCK_BYTES])
    letters = np.frombuffer(content, np.uint8) != 32
    edges = np.flatnonzero(np.diff(letters, prepend=False))
    starts, ends = edges[::2], edges[1::2]
    text_ends = np.cumsum([len(text) + 1 for text in plain], dtype=np.int64)
    offsets = np.concatenate((np.zeros(1, np.int64), np.searchsorted(starts, text_ends)))
    return Words(content, starts, ends, _hash_words(content, starts, ends), offsets)


def _plain(text: str) -> bytes:
    if not text.isascii():
        lower = unicodedata.normalize("NFC", text).lower()
        signs = _sign_map()[np.frombuffer(lower.encode("utf-32-le", "surrogatepass"), "<u4")]
        text = signs.tobytes().decode("utf-32-le")
        if (signs >= _FIRST_IDEOGRAPH).any():
            text = _IDEOGRAPH.sub(r" \1 ", text)
    return text.encode().translate(_LOWER, b"'")


@cache
def _sign_map() -> npt.NDArray[np.uint32]:
    """Return what stands for each code point: itself if it is part of words, an apostrophe if dropped, else a space."""
    signs = np.full(0x110000, _SPACE, "<u4")
    signs[:128] = np.arange(128)
    kept = [code for code in range(128, _LAST_LETTER) if unicodedata.category(chr(code))[0] in "LNM"]
    signs[kept] = kept
    signs[list(_DROPPED_TOO)] = _DROPPED
    return signs


def _hash_words(content: bytes, starts: Int64Array, ends: Int64Array) -> UInt64Array:
    blocks: UInt64Array = np.ndarray((len(content) - _BLOCK_BYTES + 1,), "<u8", content, strides=(1,))
    hashes = mix64((ends - starts).astype(np.uint64))
    left, places, sizes = np.arange(len(starts)), starts, ends - starts
    for _ in range(_MOST_BLOCKS):
        block = blocks[places] & _MASKS[np.minimum(sizes, _BLOCK_BYTES)]
        hashes[left] = mix64(hashes[left] ^ block)
        longer = sizes > _BLOCK_BYTES
        left, places, sizes = left[longer], places[longer] + _BLOCK_BYTES, sizes[longer] - _BLOCK_BYTES
        if not len(left):
            break
    for word in left.tolist():
        digest = hashlib.blake2b(content[starts[word] : ends[word]], digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    return hashes


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of n words of some texts, in order; a text of fewer words is one run of all it has.

    Attributes:
        hashes: [runs]. Runs of different lengths have different hashes.
        words: [runs], the first word of each.
        offsets: [texts + 1], the first run of each text, and the number of all.
    """

    hashes: UInt64Array
    words: Int64Array
    offsets: Int64Array


def find_runs(words: Words, length: int) -> Runs:
    """Return the runs of `length` words of each text."""
    counts = np.diff(words.offsets)
    runs = np.where(counts >= length, counts - length + 1, counts > 0)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(runs)))
    # The n-th run of a text begins at its n-th word.
    firsts = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], runs)
    hashes = np.empty(len(firsts), np.uint64)
    long = np.repeat(counts >= length, runs)
    hashes[long] = hash_runs(words.hashes, firsts[long], length)
    for short in range(1, length):
        chosen = offsets[:-1][counts == short]
        if len(chosen):
            hashes[chosen] = hash_runs(words.hashes, firsts[chosen], short)
    return Runs(hashes, firsts, offsets)


def hash_runs(hashes: UInt64Array, firsts: Int64Array, length: int) -> UInt64Array:
    """Return a hash for each run of `length` words that begins at `firsts`."""
    mixed = hashes[firsts]
    for place in range(1, length):
        mixed = mixed * _FACTOR + hashes[firsts + place]
    return mix64(mixed + np.uint64(length))


def hash_every_run(hashes: UInt64Array, length: int) -> UInt64Array:
    """Return what `hash_runs` does for the runs of one text at each of its words; it may have none."""
    count = max(0, len(hashes) - length + 1)
    mixed = hashes[:count]
    for place in range(1, length):
        mixed = mixed * _FACTOR + hashes[place : place + count]
    return mix64(mixed + np.uint64(length))


def hash_runs_of_lengths(hashes: UInt64Array, firsts: Int64Array, lengths: Sequence[int]) -> UInt64Array:
    """Return [lengths, firsts], what `hash_runs` does for each length; 0 for a run that the text ends before.

    Args:
        lengths: ascending.
    """
    padded = np.concatenate((hashes, np.zeros(lengths[-1], np.uint64)))
    mixed, sums = padded[firsts], []
    for length in range(1, lengths[-1] + 1):
        if length > 1:
            mixed = mixed * _FACTOR + padded[firsts + (length - 1)]
        if length in lengths:
            sums.append(mixed + np.uint64(length))
    runs = mix64(np.array(sums))
    runs[firsts + np.array(lengths)[:, None] > len(hashes)] = 0
    return runs
