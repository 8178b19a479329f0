"""Paragraphs of plain text; those that were wrapped to a width are one line again, verse stays as it is."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from trimaran.runtime.twin.texts.work import Tally

_BLANK: Final = re.compile(r"\n(?:[ ]*\n)+")
_LEAST_WIDTH: Final = 50
_MOST_WIDTH: Final = 100
_RULE: Final = re.compile(r"[\s*_=~·•.\-–—#+]+$")


def paragraphs_of(text: str, tally: Tally) -> list[str]:
    """Return the paragraphs of a plain text; rules such as `* * *` are left out and counted."""
    found = list[list[str]]()
    for paragraph in _BLANK.split(text):
        lines = [" ".join(line.split()) for line in paragraph.split("\n") if line.strip()]
        if lines and all(_RULE.match(line) for line in lines):
            tally.note("text.rule", paragraph)
        elif lines:
            found.append(lines)
    width = wrap_width(found)
    paragraphs = [" ".join(lines) if is_wrapped(lines, width) else "\n".join(lines) for lines in found]
    tally.note(
        "text.unwrapped", times=sum(len(lines) > 1 for lines in found) - sum("\n" in each for each in paragraphs)
    )
    return paragraphs


def wrap_width(paragraphs: Sequence[Sequence[str]]) -> int:
    """Return the length of the longest lines (all but 5%) that another one follows; 0 where no text is wrapped so."""
    lengths = sorted(len(line) for lines in paragraphs for line in lines[:-1])
    width = lengths[len(lengths) * 95 // 100] if lengths else 0
    return width if _LEAST_WIDTH <= width <= _MOST_WIDTH else 0


def is_wrapped(lines: Sequence[str], width: int) -> bool:
    """Whether lines are those of one paragraph, wrapped: the first word of each next line found no more room.

    Verse breaks lines where there was room, and so do lists and addresses.

    Args:
        width: that of the text, from `wrap_width`; 0 for one that is not wrapped.
    """
    if len(lines) < 2 or not width:
        return False
    # A line may be shorter by the spaces that were doubled after full stops.
    room = max(width, max(map(len, lines[:-1]))) - 3
    pairs = pairwise(lines)
    return all(len(line) + 1 + len(after.split(" ", 1)[0]) > room for line, after in pairs)
