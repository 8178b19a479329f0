"""The sentences of a text with their places."""

import re
from collections.abc import Iterator
from typing import Final

from trimaran.runtime.twin.persona.words import LOWER, words_in

_END: Final = re.compile(r"(?:[.!?…]+|\.--)[\"'’”»)\]]*(?=\s|$)")
_GOES_ON: Final = re.compile(rf"\s+[{LOWER},;]")
_BLANK: Final = re.compile(r"\s*")
_LONGEST_WORD: Final = 16
_ABBREVIATIONS: Final = frozenset(
    words_in(
        "mr mrs ms dr st prof capt col gen rev hon esq jr sr vs etc viz i.e e.g no vol chap cf vb vd vs "
        "bkz dr prof doç alb yrd av hz çev haz m.ö m.s"
    )
)


def sentences_of(text: str) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the sentences of a text; their ends are those of a word, quote or bracket.

    A point after an abbreviation or an initial, or before a word in lower case, ends no sentence.
    """
    start = 0
    for match in _END.finditer(text):
        if len(match[0]) == 1 and match[0] == ".":
            before = text[max(start, match.start() - _LONGEST_WORD) : match.start()].rsplit(None, 1)
            word = before[-1].strip("(\"“'‘«").lower() if before else ""
            if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word not in ("i", "o")):
                continue
        if _GOES_ON.match(text, match.end()):
            continue
        begin = _BLANK.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too
        if begin < match.end():
            yield begin, match.end()
        start = match.end()
    rest = text[start:].strip()
    if rest:
        begin = text.index(rest, start)
        yield begin, begin + len(rest)
