"""EPUB books to blocks, by ebooklib: what is unpacked is bounded, what is encrypted is refused."""

import io
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.texts.markup import read_html
from trimaran.runtime.twin.texts.work import Block, Source, Tally, UnreadableError

MOST_UNPACKED: Final = 256 << 20
"""Bytes of all that a book holds, and of all that is read of it."""
MOST_RATIO: Final = 200
"""Of unpacked bytes to packed ones, where there is more than a MiB; of XHTML it is below 20, zlib's limit is 1,032."""
_MOST_ENTRIES: Final = 10_000
_FREE_BYTES: Final = 1 << 20
_FONTS: Final = (b"http://www.idpf.org/2008/embedding", b"http://ns.adobe.com/pdf/enc#RC")
"""Algorithms that hide fonts alone."""
_ALGORITHM: Final = re.compile(rb"<(?:\w+:)?EncryptionMethod\b[^>]*Algorithm\s*=\s*[\"']([^\"']+)")
logger = logging.getLogger(__name__)


def read_epub(raw: bytes, tally: Tally) -> Source:
    """Return the blocks of a book in its reading order, with the title and author that it says.

    Its table of contents, cover and pages outside the reading order are left out and counted.

    Raises:
        UnreadableError: it is no EPUB, is encrypted, or unpacks to more than a book has.
        DataError: ebooklib or resiliparse is missing.
    """
    require_extra("ebooklib", extra="twin")
    import ebooklib
    from ebooklib import epub

    budget = _check_archive(raw)

    class Reader(epub.EpubReader):  # type: ignore[misc]
        """Reads no more than the budget, however often the book names a file."""

        left = budget

        def read_file(self, name: str) -> bytes:
            content: bytes = super().read_file(name)
            self.left -= len(content)
            if self.left < 0:
                raise UnreadableError(
                    "epub.bomb", f"it names its files so often that they are over {MOST_UNPACKED >> 20} MiB"
                )
            return content

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ebooklib's own defaults
            book = Reader(io.BytesIO(raw), {"ignore_ncx": True}).load()
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - lxml's, zipfile's and attribute errors come through
        raise UnreadableError(
            "epub.unreadable", f"it is no whole EPUB: {type(error).__name__}: {error}"[:200]
        ) from None
    source = Source([], _first(book, "title"), _first(book, "creator"))
    in_order = [book.get_item_with_id(name) for name, linear in book.spine if linear != "no"]
    for item in book.get_items_of_type(ebooklib.ITEM_NAVIGATION):
        tally.note("epub.contents", item.get_name(), times=int(item not in in_order))
    names = dict(_titles(book.toc))
    for item in in_order:
        if item is not None and not isinstance(item, epub.EpubNav):
            source.blocks += _page(item, names, tally)
    return source


def _check_archive(raw: bytes) -> int:
    """Return how many bytes may be read of an archive whose entries tell sizes and secrets that are bearable."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            # An entry is never unpacked beyond the size that it tells.
            total = sum(entry.file_size for entry in entries)
            packed = sum(entry.compress_size for entry in entries)
            if len(entries) > _MOST_ENTRIES:
                raise UnreadableError("epub.bomb", f"it has {len(entries):,} files, over {_MOST_ENTRIES:,}")
            if total > MOST_UNPACKED:
                raise UnreadableError("epub.bomb", f"unpacked it has {total >> 20:,} MiB, over {MOST_UNPACKED >> 20}")
            if total > _FREE_BYTES and total > MOST_RATIO * max(1, min(packed, len(raw))):
                ratio = total // max(1, min(packed, len(raw)))
                raise UnreadableError("epub.bomb", f"unpacked it is {ratio:,} times as large, over {MOST_RATIO}")
            _check_open(archive, entries)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise UnreadableError("epub.unreadable", f"it is no EPUB: {error}"[:200]) from None
    return MOST_UNPACKED


def _check_open(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    names = {entry.filename for entry in entries}
    hidden = sum(entry.flag_bits & 1 for entry in entries)
    if "META-INF/encryption.xml" in names:
        methods = _ALGORITHM.findall(archive.read("META-INF/encryption.xml"))
        hidden += sum(method not in _FONTS for method in methods) or ("META-INF/rights.xml" in names)
    if hidden:
        raise UnreadableError(
            "epub.encrypted", f"{hidden} of its {len(entries)} files are encrypted; name a copy without DRM"
        )


def _first(book: Any, name: str) -> str:
    found = book.get_metadata("DC", name)
    return " ".join((found[0][0] or "").split()) if found else ""


def _titles(toc: Any) -> Iterator[tuple[str, str]]:
    """Yield (file, title) of a table of contents, however deep, the first of each file last."""
    for entry in reversed(toc if isinstance(toc, list | tuple) else [toc]):
        if isinstance(entry, tuple | list):
            yield from _titles(list(entry))
        elif getattr(entry, "href", "") and getattr(entry, "title", ""):
            yield entry.href.split("#")[0], " ".join(entry.title.split())


def _page(item: Any, names: dict[str, str], tally: Tally) -> list[Block]:
    try:
        blocks = read_html(item.content, tally, "all").blocks
    except UnreadableError as error:
        tally.note("epub.page_failed", len(item.content))
        logger.warning("%s: %s", item.get_name(), error)
        return []
    if not blocks:
        tally.note("epub.page_without_text", item.get_name())
    elif not any(block.level for block in blocks) and item.get_name() in names:
        blocks.insert(0, Block(names[item.get_name()], 2))
    return blocks
