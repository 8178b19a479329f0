"""The records of reading: blocks of a source, a cleaned work with its chapters, and what was left out or changed."""

from dataclasses import dataclass, field
from typing import Final


class UnreadableError(Exception):
    """A source that can't be used.

    Args:
        reason: dotted name, such as `pdf.encrypted`.
        detail: what was found, and what would do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph or a heading of a source.

    Args:
        text: lines parted by newlines, none blank; a heading is one line.
        level: 0 for a paragraph, 1 to 6 for a heading, 1 the highest.
    """

    text: str
    level: int = 0


@dataclass(slots=True)
class Tally:
    """What was left out of one file or changed in it, by reason: how often, and how many characters."""

    times: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)

    def note(self, reason: str, text: str | int = 0, times: int = 1) -> None:
        """Count one more of a reason, with the text that is left out, or its number of characters."""
        if times:
            size = text if isinstance(text, int) else len(text)
            self.times[reason] = self.times.get(reason, 0) + times
            self.characters[reason] = self.characters.get(reason, 0) + size


@dataclass(slots=True)
class Source:
    """What a reader makes of a file: blocks in their order, and what the file says of itself ("" for nothing)."""

    blocks: list[Block]
    title: str = ""
    author: str = ""


@dataclass(frozen=True, slots=True)
class Chapter:
    """A chapter of a work.

    Args:
        title: its heading behind those above it (`ACT I, SCENE II. A room`); "" for what stands before the first.
        start, end: characters of the work's text without the heading, end exclusive.
    """

    title: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Work:
    """A cleaned work.

    Args:
        number: its place among the works of the twin, from 0.
        file: the source as the user has named it.
        title: from the file's own data, its first heading, or its name.
        author: "" where the file does not say.
        language: ISO 639-1 code.
        text: paragraphs parted by one blank line, lines by newlines, in form NFC; no line ends in a space.
        chapters: in order, without overlap, each with some text.
    """

    number: int
    file: str
    title: str
    author: str
    language: str
    text: str
    chapters: tuple[Chapter, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """What was left out of a file or changed in it, for one reason.

    Args:
        file: the source as the user has named it.
        reason: dotted name; those of WHOLE are about the whole file.
        detail: what was found; "" where the reason says it all.
        times: paragraphs, lines or places.
        characters: that are left out; 0 for what is changed only.
    """

    file: str
    reason: str
    detail: str = ""
    times: int = 1
    characters: int = 0


WHOLE: Final = (
    "file.kind", "file.unreadable", "file.too_large", "file.binary", "file.wrong_encoding", "file.empty", "file.copy",
    "html.unreadable", "epub.encrypted", "epub.bomb", "epub.unreadable",
    "pdf.encrypted", "pdf.scanned", "pdf.too_large", "pdf.unreadable", "work.copy",
)  # fmt: skip
"""Reasons for which a whole file is left out."""
