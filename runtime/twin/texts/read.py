"""Works of an author: every source read, cleaned, cut into chapters; copies of works left out; all losses counted."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_bytes
from trimaran.runtime.twin.languages import language_of
from trimaran.runtime.twin.texts.boilerplate import without_boilerplate
from trimaran.runtime.twin.texts.copies import find_copies_of_works
from trimaran.runtime.twin.texts.decode import decode_text
from trimaran.runtime.twin.texts.epub import read_epub
from trimaran.runtime.twin.texts.headings import drop_contents, mark_headings
from trimaran.runtime.twin.texts.markdown import read_markdown
from trimaran.runtime.twin.texts.markup import read_html
from trimaran.runtime.twin.texts.pdf import read_pdf
from trimaran.runtime.twin.texts.plain import paragraphs_of
from trimaran.runtime.twin.texts.sources import SourceFile, find_sources
from trimaran.runtime.twin.texts.work import Block, Chapter, Left, Source, Tally, UnreadableError, Work

MOST_FILE_BYTES = 128 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Texts:
    """The works of an author and what was left out on the way.

    Args:
        works: numbered from 0, in the order of the sources.
        language: of most of the texts; ISO 639-1 code.
        left: whole files, and parts of files by reason, in the order of the sources.
    """

    works: tuple[Work, ...]
    language: str
    left: tuple[Left, ...]

    def totals(self) -> dict[str, int]:
        """Return how often each reason was met, over all files."""
        counts = Counter[str]()
        for each in self.left:
            counts[each.reason] += each.times
        return dict(sorted(counts.items()))


def read_works(sources: Sequence[str], language: str = "") -> Texts:
    """Return the works that files and folders hold.

    Args:
        sources: names of files and folders; .txt, .md, .html, .epub and .pdf are read.
        language: ISO 639-1 code of the texts; "" to have it told for each.

    Raises:
        DataError: a source is missing, no source has text, or a package of the extras `data` or `twin` is missing.
    """
    files, left = find_sources(sources)
    works = list[Work]()
    for file in files:
        tally = Tally()
        try:
            work = _read_work(file, tally, language)
        except UnreadableError as error:
            left.append(Left(file.name, error.reason, error.detail))
            logger.warning("%s: left out: %s", file.name, error.detail)
            continue
        works.append(replace(work, number=len(works)))
        left += [
            Left(file.name, reason, "", times, tally.characters[reason])
            for reason, times in sorted(tally.times.items())
        ]
    if not works:
        why = "; ".join(f"{each.file}: {each.detail}" for each in left[:3])
        raise DataError(f"none of {len(files)} files has text that can be read: {why}")
    kept, copies = find_copies_of_works(works)
    for copy in copies:
        logger.warning("%s: left out: %s", copy.file, copy.detail)
    weights = Counter[str]()
    for work in kept:
        weights[work.language] += len(work.text)
    return Texts(tuple(kept), language or weights.most_common(1)[0][0], (*left, *copies))


def _read_work(file: SourceFile, tally: Tally, language: str) -> Work:
    """Return the work of a file; UnreadableError where it has none."""
    try:
        raw = read_bytes(file.path, MOST_FILE_BYTES)
    except OSError as error:
        raise UnreadableError("file.unreadable", error.strerror or str(error)) from None
    if not raw.strip():
        raise UnreadableError("file.empty", "it is empty")
    source, language = _read(file, raw, tally, language)
    source = without_boilerplate(source, tally)
    blocks = drop_contents(source.blocks, language, tally)
    title, blocks = _title(file, source, blocks)
    text, chapters = assemble(blocks)
    if not chapters:
        raise UnreadableError("file.empty", "it has no text besides headings and boilerplate")
    return Work(0, file.name, title, source.author, language, text, chapters)


def _read(file: SourceFile, raw: bytes, tally: Tally, language: str) -> tuple[Source, str]:
    """Return what the reader for the file's kind finds, and the language."""
    if file.kind in ("txt", "md"):
        text = decode_text(raw, tally)
        if not text.strip():
            raise UnreadableError("file.empty", "it has no text")
        language = language or language_of(text)
        if file.kind == "md":
            return read_markdown(text, tally, language), language
        return Source(mark_headings(paragraphs_of(text, tally), language)), language
    if file.kind == "pdf":
        source = read_pdf(raw, tally, language)
    else:
        source = read_epub(raw, tally) if file.kind == "epub" else read_html(raw, tally, "main")
    language = language or language_of("\n".join(block.text for block in source.blocks))
    has_headings = any(block.level for block in source.blocks)
    return (source if has_headings else replace(source, blocks=_remarked(source.blocks, language))), language


def _remarked(blocks: Sequence[Block], language: str) -> list[Block]:
    return mark_headings([block.text for block in blocks], language)


def _title(file: SourceFile, source: Source, blocks: list[Block]) -> tuple[str, list[Block]]:
    """Return the title: the file's own data, else of a page its one highest heading at the start, else its name."""
    highest = [block for block in blocks if block.level == 1]
    if source.title:
        return source.title, blocks
    if (
        file.kind == "html"
        and len(highest) == 1
        and blocks[0] is highest[0]
        and any(block.level > 1 for block in blocks)
    ):
        return blocks[0].text, blocks[1:]
    return file.path.stem.replace("_", " ").replace("-", " ").strip() or file.name, blocks


def assemble(blocks: Sequence[Block]) -> tuple[str, tuple[Chapter, ...]]:
    """Return the text of blocks, with a blank line between any two, and the chapters that have text."""
    pieces = list[str]()
    chapters = list[Chapter]()
    path: dict[int, str] = {}
    at = start = 0
    for block in blocks:
        if block.level:
            chapters += _chapter(path, start, at)
            path = {level: title for level, title in path.items() if level < block.level} | {block.level: block.text}
        pieces.append(block.text)
        at += len(block.text) + 2
        start = at if block.level else start
    chapters += _chapter(path, start, at)
    return "\n\n".join(pieces), tuple(chapters)


def _chapter(path: dict[int, str], start: int, after: int) -> list[Chapter]:
    return [Chapter(", ".join(path.values()), start, after - 2)] if after > start else []
