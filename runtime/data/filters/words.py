"""The words and lines of a text, found once and shared by the filters.

A word is one of these, wherever it stands in the text:

- letters, digits, underscores and combining marks in a row. An apostrophe or point between two of them belongs to the
  word (don't, example.org), and so does a comma between two digits (1,000).
- one such character of a script that puts no spaces between words: Han, Hiragana, Katakana, Thai, Lao, Burmese, Khmer.
- one other character that is no white space, repeated or not (..., !!, —).

Words are kept as numbers: where each begins, and hashes of it and of the words after it, by which numpy compares all
runs of n words at once. Two different runs have the same hash with a probability of about 2**-64.
"""

import re
import unicodedata
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trimaran.runtime.data.filters.characters import PUNCTUATION

Hashes = NDArray[np.uint64]

_SPACE, _WORD, _ALONE, _OTHER = 0, 1, 2, 3
_KIND: Final = 3
"""The bits that hold one of the four."""
LETTER: Final = 4
"""Bit of `Words.flags`: the word has a letter."""
SPOKEN: Final = 8
"""Bit of `Words.flags`: the word has a character that is no punctuation."""
_OF_WORD, _DIGIT, _JOINS_WORD, _JOINS_DIGITS = 16, 32, 64, 128
"""Bits of characters: the last two join what has the first two, which stand two bits lower."""

# Blocks of scripts without spaces between words. Their punctuation is no part of words and stays what it is.
_WITHOUT_SPACES: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x19E0, 0x19FF),  # Khmer
    (0x2E80, 0x2FDF),  # Han: radicals
    (0x3005, 0x3007),  # Han: iteration mark, closing mark, zero
    (0x3021, 0x3029),  # Han: numerals
    (0x3038, 0x303B),  # Han: numerals, iteration mark
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),  # Han
    (0xA9E0, 0xA9FF),  # Burmese
    (0xAA60, 0xAA7F),  # Burmese
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x16FE3, 0x16FE3),  # Han: iteration mark
    (0x16FF0, 0x16FF1),  # Han: reading marks
    (0x1AFF0, 0x1B16F),  # Hiragana, Katakana
    (0x20000, 0x3FFFF),  # Han
)
_VARIATION_SELECTORS: Final = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
"""Marks, but of the picture before them and of no word."""
_BASE: Final = 0x9E3779B97F4A7C15
_INVERSE: Final = pow(_BASE, -1, 1 << 64)
_GRAM_BASE: Final = 0xD1B54A32D192ED03
_MASK: Final = (1 << 64) - 1
_BLOCK: Final = 1 << 15
"""Characters hashed at once, so that the numbers stay in the processor's cache."""


class Words:
    """The words of a text; `words_of` makes one.

    Attributes:
        count: number of words.
        starts: [count], int64: place of each word's first character in the text.
        bounds: [count + 1], int64: characters of all words before word i, without the spaces.
        flags: [count], uint8: bits LETTER and SPOKEN of each word.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        codes, keys, flags = _characters(text)
        _join(keys, flags)
        first = np.ones(len(keys), bool)
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        first |= keys == _ALONE
        places = first.nonzero()[0]
        is_word = keys.take(places) != _SPACE
        self.starts = places[is_word]
        self.count = len(self.starts)
        places = np.append(places, len(codes))
        self.bounds = _with_sums((places[1:] - places[:-1])[is_word])
        self.flags = self._word_flags(flags)
        sums = _prefix_sums(codes, places)
        self.hashes: Hashes = ((sums[1:] - sums[:-1]) * _powers(places[:-1], _INVERSE))[is_word]
        """The hash of every word."""

    def _word_flags(self, flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the bits of each word: mostly its first character's, as only letters and digits stand with others."""
        found: NDArray[np.uint8] = flags.take(self.starts)
        unsure = np.flatnonzero((found & _KIND == _WORD) & (found & (LETTER | SPOKEN) != LETTER | SPOKEN))
        if len(unsure):
            starts = self.starts[unsure]
            ends = np.column_stack((starts, starts + self.lengths(1)[unsure])).ravel()
            found[unsure] = np.bitwise_or.reduceat(flags, ends[ends < len(flags)])[::2]
        return found

    def runs(self, n: int) -> Hashes:
        """Return the hash of every run of n words, as one text without the spaces."""
        sums, inverses = self._run_sums
        return (sums[n:] - sums[:-n]) * inverses[:-n]

    def runs_of(self, lengths: NDArray[np.int64]) -> Hashes:
        """Return `runs(n)` of several n as rows; the runs that would go beyond the last word have some other hash."""
        sums, inverses = self._run_sums
        ends = np.add.outer(lengths, np.arange(self.count))
        return (np.append(sums, np.zeros(lengths.max(), np.uint64)).take(ends) - sums[:-1]) * inverses[:-1]

    @cached_property
    def _run_sums(self) -> tuple[Hashes, Hashes]:
        return _with_sums(self.hashes * _powers(self.bounds[:-1], _BASE)), _powers(self.bounds, _INVERSE)

    def grams(self, n: int) -> Hashes:
        """Return the hash of every run of n words, as a sequence of words."""
        found = self.hashes
        for shift in range(1, n):
            found = found[:-1] * np.uint64(_GRAM_BASE) + self.hashes[shift:]
        return found

    def lengths(self, n: int) -> NDArray[np.int64]:
        """Return the characters of every run of n words, without the spaces."""
        lengths: NDArray[np.int64] = self.bounds[n:] - self.bounds[:-n]
        return lengths

    def passage(self, first: int, n: int) -> str:
        """Return the text from word `first` to the end of the n-th word from there."""
        last = first + n - 1
        return self._text[self.starts[first] : self.starts[last] + self.bounds[last + 1] - self.bounds[last]]

    def texts(self) -> list[str]:
        """Return the words."""
        stops = (self.starts + self.lengths(1)).tolist()
        return [self._text[start:stop] for start, stop in zip(self.starts.tolist(), stops, strict=True)]


@lru_cache(maxsize=1)
def words_of(text: str) -> Words:
    """Return the words of a text; those of the last text are remembered, for the filters to share."""
    return Words(text)


@lru_cache(maxsize=1)
def lines_of(text: str) -> list[str]:
    """Return the lines of a text, as Python splits them; those of the last text are remembered."""
    return text.splitlines()


def split_words(text: str) -> list[str]:
    """Return the words of a text."""
    return words_of(text).texts()


_LATIN_ENDS, _OTHER_ENDS, _CLOSING = "[.!?…]", "[。！？｡؟।॥።။។]", """["'”’»」』）)\\]]"""
# The search is linear in texts of a million dots: a row of them is tried at its first one alone, and never in part.
_SENTENCE_END = re.compile(
    rf"{_LATIN_ENDS[:-1]}{_OTHER_ENDS[1:]}"
    rf"(?:(?<={_LATIN_ENDS})(?<!{_LATIN_ENDS}{{2}}){_LATIN_ENDS}*+{_CLOSING}*+(?=\s++[^a-zà-öø-ÿ]|\s*+$)"
    rf"|(?<={_OTHER_ENDS}){_OTHER_ENDS}*+{_CLOSING}*+)"
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text: they end at a full stop, exclamation or question mark of any larger script.

    Those of Latin script end one only before white space that no small letter follows.
    """
    stops = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces = [text[start:stop].strip() for start, stop in zip([0, *stops], [*stops, len(text)], strict=True)]
    return [piece for piece in pieces if piece]


def _characters(text: str) -> tuple[NDArray[np.uint8 | np.uint32], NDArray[np.uint8 | np.uint32], NDArray[np.uint8]]:
    """Return of each character: its code, a key that is the same for neighbours in one word, and its bits."""
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return codes, _keys().take(codes), _bits().take(codes)
    keys, bits = _latin_tables()
    new_keys = np.frombuffer(bytearray(raw.translate(keys)), np.uint8)
    return np.frombuffer(raw, np.uint8), new_keys, np.frombuffer(raw.translate(bits), np.uint8)


def _join(keys: NDArray[np.uint8 | np.uint32], flags: NDArray[np.uint8]) -> None:
    """Make apostrophes and points between characters of words, and commas between digits, characters of words."""
    joined = flags[:-2] & flags[2:] & (flags[1:-1] >> 2)
    joined &= _OF_WORD | _DIGIT
    np.copyto(keys[1:-1], _WORD, where=joined != 0)


@lru_cache(maxsize=1)
def _bits() -> NDArray[np.uint8]:
    """Return the kind and the bits of every character, by its code."""
    table = np.full(0x110000, _OTHER | SPOKEN, np.uint8)
    for first, last in ((0, 0x323AF), (0xE0000, 0xE01FF)):  # beyond, Unicode has no letters, digits and marks
        characters = "".join(map(chr, range(first, last + 1)))
        categories = np.array(list(map(unicodedata.category, characters)))
        part = table[first : last + 1]
        part[np.isin(categories, ("Mn", "Mc"))] = _WORD | SPOKEN
        for kind, pattern in ((_WORD | SPOKEN, r"\w+"), (_SPACE, r"\s+")):
            for found in re.finditer(pattern, characters):
                part[found.start() : found.end()] = kind
        part[np.char.startswith(categories, "L")] |= LETTER
        part[categories == "Nd"] |= _DIGIT
    for first, last in _VARIATION_SELECTORS:
        table[first : last + 1] = _OTHER | SPOKEN
    for first, last in _WITHOUT_SPACES:
        part = table[first : last + 1]
        part[part & _KIND == _WORD] ^= _WORD ^ _ALONE
    for characters, bit in (("'’.", _JOINS_WORD), (",", _JOINS_DIGITS)):
        table[list(map(ord, characters))] |= bit
    table[[ord(each) for each in PUNCTUATION if not each.isspace()]] ^= SPOKEN
    table[table & _KIND == _WORD] |= _OF_WORD
    return table


@lru_cache(maxsize=1)
def _keys() -> NDArray[np.uint32]:
    """Return the key of every character, by its code: its kind, and for other characters one of its own."""
    kinds = _bits() & _KIND
    codes = np.arange(len(kinds), dtype=np.uint32)
    return np.where(kinds == _OTHER, codes + _OTHER, kinds)


@lru_cache(maxsize=1)
def _latin_tables() -> tuple[bytes, bytes]:
    """Return keys and bits of the first 256 characters; the keys fit, as the last of them are letters."""
    return _keys()[:256].astype(np.uint8).tobytes(), _bits()[:256].tobytes()


@lru_cache(maxsize=2)
def _low_powers(base: int) -> Hashes:
    return np.cumprod(np.array([1] + [base] * (_BLOCK - 1), np.uint64), dtype=np.uint64)


def _powers(exponents: NDArray[np.int64], base: int) -> Hashes:
    """Return base**exponent modulo 2**64 for ascending exponents."""
    low = _low_powers(base)
    if not len(exponents) or exponents[-1] < _BLOCK:
        return low.take(exponents)
    blocks, rest = np.divmod(exponents, _BLOCK)
    high = np.cumprod(np.array([1] + [pow(base, _BLOCK, 1 << 64)] * int(blocks[-1]), np.uint64), dtype=np.uint64)
    return high.take(blocks) * low.take(rest)


def _with_sums(numbers: NDArray[Any]) -> NDArray[Any]:
    """Return the sum of the numbers before each, and of all."""
    sums = np.zeros(len(numbers) + 1, numbers.dtype)
    np.add.accumulate(numbers, out=sums[1:])
    return sums


@lru_cache(maxsize=1)
def _low_sums() -> Hashes:
    return _with_sums(_low_powers(_BASE))


def _prefix_sums(codes: NDArray[np.uint8 | np.uint32], places: NDArray[np.int64]) -> Hashes:
    """Return the sum of (code + 1) * _BASE**place over the characters before each of the ascending places."""
    low, low_sums, step = _low_powers(_BASE), _low_sums(), pow(_BASE, _BLOCK, 1 << 64)
    sums = np.zeros(len(places), np.uint64)
    total, scale, done = 0, 1, 1  # no character is before place 0
    for start in range(0, len(codes), _BLOCK):
        part = codes[start : start + _BLOCK] * low[: len(codes) - start]
        np.add.accumulate(part, out=part)
        stop = int(np.searchsorted(places, start + len(part), "right"))
        inside = places[done:stop] - start
        found = part.take(inside - 1) + low_sums.take(inside)
        sums[done:stop] = found * np.uint64(scale) + np.uint64(total) if start else found
        total = (total + (int(part[-1]) + int(low_sums[len(part)])) * scale) & _MASK
        scale, done = scale * step & _MASK, stop
    return sums
