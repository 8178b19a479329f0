"""Quotes in an answer, held against passages character by character."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from trimaran.runtime.twin.passages import Passage

_QUOTE: Final = re.compile(
    r'"(?P<straight>[^"]{1,2000})"'
    r"|“(?P<double>[^“”]{1,2000})”"
    r"|„(?P<low>[^„“”]{1,2000})[“”]"
    r"|«(?P<angle>[^«»]{1,2000})»"
    # The closing sign is an apostrophe too: one before a letter (don’t) or after an s before a space is none.
    r"|(?<![\w’])‘(?P<single>(?:[^‘’]|’(?=\w)){1,2000})’(?!\w)"
)
LEAST_WORDS: Final = 2
"""A single word between quotation marks is a name or is meant otherwise: it is not held against the passages."""
_WORD: Final = re.compile(r"\w+")
_OMISSION: Final = re.compile(r"\s*(?:\[(?:\.\.\.|…)\]|\(\.\.\.\)|\.\.\.|…)\s*")
_LINE_SLASH: Final = re.compile(r"\s+/\s+")
_LAST: Final = ".,;:!?"
_SAME: Final = MappingProxyType({"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', "–": "—", "…": "..."})


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote in an answer.

    Args:
        text: between the quotation marks.
        start, end: characters of the answer, with the marks.
        number: of the passage that has it, from 1; 0 where none has.
        first_line, last_line: of the work's cleaned text, from 1; 0 where no passage has it.
    """

    text: str
    start: int
    end: int
    number: int
    first_line: int
    last_line: int

    @property
    def is_verbatim(self) -> bool:
        """Whether a passage has it."""
        return self.number > 0


def quote_spans(text: str) -> list[tuple[int, int]]:
    """Return where quotes begin and end, with their marks, single words too."""
    return [match.span() for match in _QUOTE.finditer(text)]


def check_quotes(answer: str, passages: Sequence[Passage]) -> list[Quote]:
    """Return the quotes of an answer of at least LEAST_WORDS, each with the passage that has it.

    A quote is verbatim where a passage has all its characters in a row. Alike count: any white space, the forms of
    apostrophes, dashes and inner quotation marks. A stop or comma before the closing mark may be the answer's own,
    ` / ` stands for a line's end, and at an ellipsis something may be left out: the parts are in one passage, in order.
    """
    plain = [_plain(each.text) for each in passages]
    quotes = []
    for match in _QUOTE.finditer(answer):
        text = match[match.lastgroup or 0]
        if len(_WORD.findall(text)) < LEAST_WORDS:
            continue
        number, first, last = next(_places(text, plain), (0, 0, 0))
        if number:
            passage = passages[number - 1]
            lines = [passage.first_line + passage.text.count("\n", 0, place) for place in (first, last)]
        else:
            lines = [0, 0]
        quotes.append(Quote(text, match.start(), match.end(), number, lines[0], lines[1]))
    return quotes


def _places(quote: str, plain: Sequence[tuple[str, list[int]]]) -> Iterator[tuple[int, int, int]]:
    """Yield (number, first character, last character) for each passage that has a quote."""
    parts = [_plain(part)[0].strip() for part in _OMISSION.split(_LINE_SLASH.sub(" ", quote))]
    parts = [part for part in parts if part]
    for number, (text, origins) in enumerate(plain, 1):
        for last in (parts[-1], parts[-1].rstrip(_LAST)) if parts else ():
            if last and (found := _in_order([*parts[:-1], last], text)):
                yield number, origins[found[0]], origins[found[1]]
                break


def _in_order(parts: Sequence[str], text: str) -> tuple[int, int] | None:
    first = at = -1
    for part in parts:
        place = _find(part, text, max(0, at))
        if place < 0:
            return None
        first = place if first < 0 else first
        at = place + len(part)
    return first, at - 1


def _find(part: str, text: str, start: int) -> int:
    """Return where a part stands as whole words, -1 for nowhere: `end it` is no quote of `send it`."""
    while (place := text.find(part, start)) >= 0:
        after = place + len(part)
        begins = place == 0 or not (text[place - 1].isalnum() and part[0].isalnum())
        ends = after == len(text) or not (text[after].isalnum() and part[-1].isalnum())
        if begins and ends:
            return place
        start = place + 1
    return -1


def _plain(text: str) -> tuple[str, list[int]]:
    """Return a text with one form of each sign and single spaces, and for each of its characters where it came from."""
    signs, origins = list[str](), list[int]()
    for place, sign in enumerate(text.replace("--", "—\0")):
        if sign == "\0":
            continue
        for one in " " if sign.isspace() else _SAME.get(sign, sign):
            if one != " " or (signs and signs[-1] != " "):
                signs.append(one)
                origins.append(place)
    return "".join(signs), origins
