"""PDF to paragraphs, by pypdf: running heads, page numbers and hyphens at line ends go, and are counted."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.texts.decode import clean_text
from trimaran.runtime.twin.texts.headings import mark_headings
from trimaran.runtime.twin.texts.work import Source, Tally, UnreadableError

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
_SHORT: Final = 0.8
_VERSE: Final = 0.6


def read_pdf(raw: bytes, tally: Tally, language: str) -> Source:
    """Return the blocks of a PDF that has text, with the title and author that it says.

    Args:
        language: in which headings are looked for.

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
    lines = _without_heads(pages, tally)
    return Source(mark_headings(_paragraphs(lines, tally), language), title, author)


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


def _without_heads(pages: Sequence[Sequence[str]], tally: Tally) -> list[str]:
    """Return all lines without page numbers and running heads.

    A running head stands at the same edge of at least three pages, but for its digits.
    """
    seen = Counter((edge, _key(line)) for lines in pages for edge, line in _edges(lines) if line)
    kept: list[str] = []
    for lines in pages:
        top, bottom = 0, len(lines)
        while top < min(_EDGE, bottom) and (reason := _reason("top", lines[top], seen)):
            tally.note(reason, lines[top])
            top += 1
        while bottom > max(top, len(lines) - _EDGE) and (reason := _reason("foot", lines[bottom - 1], seen)):
            tally.note(reason, lines[bottom - 1])
            bottom -= 1
        kept += lines[top:bottom]
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


def _paragraphs(lines: Sequence[str], tally: Tally) -> list[str]:
    """Return paragraphs: they end at a blank line, or at a line that ends a sentence and leaves room.

    Hyphens at line ends are taken out where the next line goes on in lower case.
    """
    lengths = [len(line) for line in lines if line]
    width = sorted(lengths)[len(lengths) * 9 // 10] if lengths else 0
    groups: list[list[str]] = [[]]
    for line in lines:
        if not line:
            groups.append([])
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
