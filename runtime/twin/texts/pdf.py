"""PDF to paragraphs, by pypdf: running heads, page numbers and hyphens at line ends go, and are counted."""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.languages import language_of
from trimaran.runtime.twin.texts.decode import clean_text
from trimaran.runtime.twin.texts.headings import is_heading, mark_headings
from trimaran.runtime.twin.texts.work import Block, Source, Tally, UnreadableError

MOST_PAGES: Final = 10_000
_MOST_CHARACTERS: Final = 64 << 20
_EDGE: Final = 2
"""Lines at the top and at the foot of a page that may be running heads."""
_LEAST_REPEATS: Final = 3
_LEAST_CHARACTERS: Final = 20
"""Of a page that counts as one with text; a stamp on a scanned page has fewer."""
_PAGE_NUMBER: Final = re.compile(
    r"[\s\-–—\[(|]*(?:page|sayfa|seite|p\.|s\.)?\s*(?:\d{1,4}|[ivxl]{1,7})(?:\s*(?:/|of)\s*\d{1,4})?[\s\-–—\])|.]*$",
    re.IGNORECASE,
)
_CAPITAL_NUMBER: Final = re.compile(r"\s*[IVXL]+\.?\s*$")
_HYPHEN: Final = re.compile(r"(?<=[^\W\d_])[-\u2010\xad]\n(?=[^\W\d_])")
_ENDS: Final = re.compile(r"[.!?…:]['\"”’»)\]]*$")
_BOOKMARK_LEVELS: Final = 2
_NUMBER_CHARACTERS: Final = 12
"""Letters and digits that may stand before a title on its page: `Chapter 12`."""
_SHORT: Final = 0.8
_VERSE: Final = 0.6


def read_pdf(raw: bytes, tally: Tally, language: str) -> Source:
    """Return the blocks of a PDF that has text, with the title and author that it says.

    Headings are its bookmarks; without them, lines that look like headings.

    Args:
        language: in which headings are looked for; "" to have it told.

    Raises:
        UnreadableError: it is no PDF, is encrypted, or has no text.
        DataError: pypdf is missing.
    """
    require_extra("pypdf", extra="twin")
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("pdf.encrypted", "it is encrypted; name a copy that opens without a password")
        count = len(reader.pages)
        if count > MOST_PAGES:
            raise UnreadableError("pdf.too_large", f"it has {count:,} pages, over {MOST_PAGES:,}")
        metadata = reader.metadata
        title, author = (_plain(getattr(metadata, name, None)) for name in ("title", "author"))
        pages = _pages(reader, count, tally)
    except DependencyError as error:
        raise UnreadableError("pdf.encrypted", f"it is encrypted, and opens by another package only: {error}") from None
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - key, type and recursion errors of broken files come through
        raise UnreadableError("pdf.unreadable", f"it is no whole PDF: {type(error).__name__}: {error}"[:200]) from None
    with_text = sum(sum(map(len, lines)) >= _LEAST_CHARACTERS for lines in pages)
    if not with_text:
        what = f"none of its {count:,} pages has text" if count else "it has no page"
        raise UnreadableError("pdf.scanned", f"{what}; a scanned book has to go through text recognition (OCR) first")
    tally.note("pdf.page_without_text", times=count - with_text)
    pages = _without_heads(pages, tally)
    marks = _bookmarks(reader)
    if not marks:
        lines = [line for page in pages for line in page]
        language = language or language_of("\n".join(lines))
        paragraphs = _paragraphs(lines, tally, lambda line: is_heading(line, language))
        return Source(mark_headings(paragraphs, language), title, author)
    return Source(_by_bookmarks(pages, marks, tally), title, author)


def _plain(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _pages(reader: Any, count: int, tally: Tally) -> list[list[str]]:
    """Return the lines of each page; a blank one is ""."""
    pages, size = list[list[str]](), 0
    for number in range(count):
        try:
            text = clean_text(reader.pages[number].extract_text() or "", tally)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - of a broken page pypdf says so in many ways
            tally.note("pdf.page_failed")
            text = ""
        size += len(text)
        if size > _MOST_CHARACTERS:
            raise UnreadableError("pdf.too_large", f"it has over {_MOST_CHARACTERS:,} characters")
        pages.append([" ".join(line.split()) for line in text.strip().split("\n")])
    return pages


def _bookmarks(reader: Any) -> list[tuple[int, str, int]]:
    """Return page, title and level (1 the highest) of the bookmarks of the two highest levels, in their order."""
    found = list[tuple[int, str, int]]()

    def walk(entries: Any, level: int) -> None:
        for entry in entries:
            if isinstance(entry, list):
                if level < _BOOKMARK_LEVELS:
                    walk(entry, level + 1)
            elif title := _plain(getattr(entry, "title", None)):
                page = reader.get_destination_page_number(entry)
                if isinstance(page, int) and page >= 0:
                    found.append((page, title, level))

    try:
        walk(reader.outline, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - of broken bookmarks pypdf says so in many ways; headings are looked for instead
        return []
    return sorted(found, key=lambda mark: mark[0])


def _by_bookmarks(pages: Sequence[Sequence[str]], marks: Sequence[tuple[int, str, int]], tally: Tally) -> list[Block]:
    """Return blocks with a heading for each bookmark: at the lines of its page that are its title, else at the top."""
    blocks = list[Block]()
    lines = list[str]()
    for number, page in enumerate(pages):
        at = 0
        for _, title, level in (mark for mark in marks if mark[0] == number):
            first, after = _place(title, page, at)
            lines += page[at:first]
            blocks += map(Block, _paragraphs(lines, tally))
            blocks.append(Block(title, level))
            lines, at = [], after
        lines += page[at:]
    return blocks + list(map(Block, _paragraphs(lines, tally)))


def _place(title: str, page: Sequence[str], start: int) -> tuple[int, int]:
    """Return the lines, from `start` on, that are a title, perhaps behind its number; else none, at `start`."""
    wanted = _letters(title)
    for first in range(start, len(page)):
        for after in range(first + 1, min(first + 3, len(page)) + 1):
            shown = _letters("".join(page[first:after]))
            if wanted and (
                shown == wanted or (shown.endswith(wanted) and len(shown) <= len(wanted) + _NUMBER_CHARACTERS)
            ):
                return first, after
    return start, start


def _letters(text: str) -> str:
    return "".join(sign for sign in text.casefold() if sign.isalnum())


def _without_heads(pages: Sequence[Sequence[str]], tally: Tally) -> list[list[str]]:
    """Return the lines of each page without page numbers and running heads.

    A running head stands at the same edge of at least three pages, but for its digits.
    """
    seen = Counter((edge, _key(line)) for lines in pages for edge, line in _edges(lines) if line)
    kept: list[list[str]] = []
    for lines in pages:
        top, bottom = 0, len(lines)
        while top < min(_EDGE, bottom) and (reason := _reason("top", lines[top], seen)):
            tally.note(reason, lines[top])
            top += 1
        while bottom > max(top, len(lines) - _EDGE) and (reason := _reason("foot", lines[bottom - 1], seen)):
            tally.note(reason, lines[bottom - 1])
            bottom -= 1
        kept.append(list(lines[top:bottom]))
    return kept


def _edges(lines: Sequence[str]) -> list[tuple[str, str]]:
    return [*(("top", line) for line in lines[:_EDGE]), *(("foot", line) for line in lines[_EDGE:][-_EDGE:])]


def _key(line: str) -> str:
    return re.sub(r"\d+", "#", line).casefold()


def _reason(edge: str, line: str, seen: Counter[tuple[str, str]]) -> str:
    if _PAGE_NUMBER.match(line) and not _CAPITAL_NUMBER.match(line):
        return "pdf.page_number"
    return "pdf.running_head" if seen[edge, _key(line)] >= _LEAST_REPEATS and not _ends(line) else ""


def _ends(line: str) -> bool:
    return bool(_ENDS.search(line))


def _paragraphs(
    lines: Sequence[str], tally: Tally, is_heading: Callable[[str], bool] = lambda line: False
) -> list[str]:
    """Return paragraphs: they end at a blank line, or at a line that ends a sentence and leaves room.

    A heading that leaves room is one of its own. Hyphens at line ends are taken out where the next line goes on in
    lower case.
    """
    lengths = [len(line) for line in lines if line]
    width = sorted(lengths)[len(lengths) * 9 // 10] if lengths else 0
    groups: list[list[str]] = [[]]
    for line in lines:
        if not line:
            groups.append([])
            continue
        if len(line) < _SHORT * width and is_heading(line):
            groups += [[line], []]
            continue
        groups[-1].append(line)
        if _ends(line) and len(line) < _SHORT * width:
            groups.append([])
    return [_joined(group, width, tally) for group in groups if group]


def _joined(lines: Sequence[str], width: int, tally: Tally) -> str:
    if len(lines) > 2 and median(map(len, lines[:-1])) < _VERSE * width:
        return "\n".join(lines)
    text = "\n".join(lines)
    for match in reversed(list(_HYPHEN.finditer(text))):
        if text[match.end()].islower():
            text = text[: match.start()] + text[match.end() :]
            tally.note("pdf.hyphen")
    return text.replace("\n", " ")
