"""Where a paragraph of prose speaks: quotes of several styles, and dashes as Turkish novels use them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from trimaran.runtime.twin.persona.paragraphs import Paragraph
from trimaran.runtime.twin.persona.words import LETTER, UPPER

_QUOTES: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "curly": re.compile(r"[“„](?P<said>[^“”„]*)(?P<close>”|$)"),
        "straight": re.compile(r'"(?P<said>[^"]*)(?P<close>"|$)'),
        "guillemets": re.compile(r"«(?P<said>[^«»]*)(?P<close>»|$)"),
        "single": re.compile(rf"‘(?P<said>(?:[^‘’]|’(?=[{LETTER}]))*)(?P<close>’|$)"),
        "typewriter": re.compile(rf"(?<![\w'`])[`'](?P<said>[{UPPER}\w].*?[.,!?;:…—-])(?P<close>')(?!\w)", re.DOTALL),
    }
)
_DASH: Final = re.compile(r"[ \t]*[—–―-]+[ \t]*(?=\S)")
_TERMINAL: Final = re.compile(r"[.!?…,;:—–-][\"'’”]?$")
_SPEAKABLE: Final = re.compile(r"[.!?:,;—–-]\s*$")
DASH: Final = "dash"


@dataclass(frozen=True, slots=True)
class Quote:
    """A piece of speech in a paragraph.

    Args:
        start, end: with its marks.
        said_start, said_end: without them.
        is_open: whether its closing mark is missing: the next paragraph goes on.
    """

    start: int
    end: int
    said_start: int
    said_end: int
    is_open: bool = False


def style_of(paragraphs: Sequence[Paragraph]) -> str | None:
    """Return the style in which most speech of a work is marked, None where there is none."""
    counts = {
        name: sum(len(pattern.findall(paragraph.text)) for paragraph in paragraphs) for name, pattern in _QUOTES.items()
    }
    counts[DASH] = sum(_DASH.match(paragraph.text) is not None for paragraph in paragraphs)
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= 2 else None


def quotes_of(text: str, style: str) -> Iterator[Quote]:
    """Yield the quotes of a paragraph that may be speech; a word or title in quotes amid narration is not.

    Args:
        style: of `style_of`, but not a dash.
    """
    for match in _QUOTES[style].finditer(text):
        said = match["said"].strip()
        before = text[: match.start()].rstrip()
        begins = not before or _SPEAKABLE.search(before) is not None or before.endswith(("”", '"', "»", "’", "'"))
        if any(character.isalpha() for character in said) and (begins or _TERMINAL.search(said)):
            start = match.start("said")
            yield Quote(match.start(), match.end(), start, match.end("said"), not match["close"])


def dash_of(text: str) -> int | None:
    """Return where the words begin in a paragraph that a dash opens, None in another one."""
    found = _DASH.match(text)
    return None if found is None else found.end()
