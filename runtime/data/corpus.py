"""From `data.source` to text: find the files, read documents, cut long ones into sections, count what was dropped."""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import BinaryIO

from trimaran.runtime.data.files import DataError, hash_file, unreadable

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
# Documents above this are cut at blank lines, so that one book can lie partly in the training and partly in the
# held-out split.
SECTION_CHARACTERS = 32 * 1024

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(r"\n")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus and the JSON field that holds its text (jsonl only)."""

    path: Path
    text_field: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A document, or one section of a long document.

    `continues`: it directly follows the unit before it in the same document.
    """

    text: str
    continues: bool


@dataclass(slots=True)
class CorpusCounts:
    """Counts of what was read, dropped and replaced; written to the manifest.

    `bytes` and `characters` are of the text kept, in UTF-8. `replaced_bytes` were not UTF-8 and became U+FFFD, as did
    `replaced_surrogates` (unpaired surrogates in JSON escapes). `carriage_returns_removed` counts CRLF line ends made
    LF in .txt.
    """

    files: int = 0
    documents: int = 0
    units: int = 0
    bytes: int = 0
    characters: int = 0
    replaced_bytes: int = 0
    replaced_surrogates: int = 0
    carriage_returns_removed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count one dropped item."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def find_files(sources: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """Return the corpus files of the sources in a fixed order, and how many files were skipped, by reason.

    A folder is searched recursively, without hidden files and folders (the cache is one). Names are sorted within each
    source, and sources keep their order. A file named twice is read once. Raises DataError for a source that doesn't
    exist, matches no usable file, or is a file of another kind.
    """
    found: dict[Path, Path] = {}
    passed_over: Counter[str] = Counter()
    for source in sources:
        usable = 0
        root = Path(source).expanduser()
        for path in _expand(source, root):
            if root.is_dir() and any(part.startswith(".") for part in path.relative_to(root).parts):
                passed_over["hidden file"] += 1
                continue
            if not path.name.endswith(SUFFIXES):
                passed_over["file of another kind"] += 1
                continue
            usable += 1
            if path.resolve() in found:
                passed_over["file named twice"] += 1
            found.setdefault(path.resolve(), path)
        if not usable:
            raise DataError(
                f"data.source {source!r} holds no {', '.join(SUFFIXES)} file; "
                "name such files, a folder or a glob of them"
            )
    if not found:
        raise DataError("data.source is empty; name at least one file, folder or glob, or 'quickstart'")
    return list(found.values()), passed_over


def _expand(source: str, path: Path) -> list[Path]:
    if path.is_dir():
        # Anything that isn't a folder counts as a file here: a broken link must fail when it is read, not be skipped.
        return sorted(entry for entry in path.rglob("*") if not entry.is_dir())
    if path.exists() or path.is_symlink():
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                f"data.source {source!r} is not a {', '.join(SUFFIXES)} file; convert it, or name another file"
            )
        return [path]
    if any(sign in source for sign in "*?["):
        return sorted(Path(match) for match in glob(str(path), recursive=True) if not Path(match).is_dir())
    raise DataError(
        f"data.source {source!r} does not exist (seen from {Path.cwd()}); correct the path, or use 'quickstart'"
    )


def hash_files(files: Sequence[SourceFile]) -> str:
    """Return one sha256 of the kinds and contents of the files in order.

    Names and paths don't enter, so a moved corpus has the same hash.
    """
    digest = hashlib.sha256()
    for file in files:
        kind = f"jsonl {file.text_field}" if ".jsonl" in file.path.name else "txt"
        digest.update(f"{kind} {hash_file(file.path)}\n".encode())
    return digest.hexdigest()


def iter_units(files: Sequence[SourceFile], counts: CorpusCounts) -> Iterator[Unit]:
    """Yield every unit of the corpus in order and update `counts`.

    A .txt file is one document and is held in memory whole; a .jsonl file is read line by line. Documents of white
    space only are dropped and counted. Raises DataError naming the file, and for jsonl the line, that can't be read.
    """
    for file in files:
        counts.files += 1
        documents = _jsonl_documents(file, counts) if ".jsonl" in file.path.name else _text_document(file, counts)
        for document in documents:
            if not document.strip():
                counts.drop("empty document")
                continue
            counts.documents += 1
            counts.characters += len(document)
            counts.bytes += len(document.encode())
            for index, section in enumerate(split_sections(document)):
                counts.units += 1
                yield Unit(section, continues=index > 0)


def split_sections(text: str, limit: int = SECTION_CHARACTERS) -> list[str]:
    """Return sections that join to exactly `text`, cut at blank lines, each as long as `limit` characters allow.

    A paragraph that is longer than that is cut at line ends (verse and one-sentence-a-line corpora may have no blank
    line at all); a single line is never cut.
    """
    if len(text) <= limit:
        return [text]
    sections, start, last = [], 0, 0
    for cut in _cuts(text, limit):
        if cut - start > limit and last > start:
            sections.append(text[start:last])
            start = last
        last = cut
    return [*sections, text[start:]]


def _cuts(text: str, limit: int) -> Iterator[int]:
    """Yield the positions to cut at, in order.

    These are ends of blank lines, line ends in paragraphs above `limit`, and the end of the text.
    """
    start = 0
    for end in (*(match.end() for match in _BLANK_LINES.finditer(text, 0, len(text) - 1)), len(text)):
        if end - start > limit:
            yield from (match.end() for match in _LINE_END.finditer(text, start, end - 1))
        yield end
        start = end


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Return (text, number of bytes that were not UTF-8 and were replaced by U+FFFD).

    A leading byte order mark is removed.
    """
    text = data.decode("utf-8", errors="replace")
    # The decoder merges up to three bad bytes into one U+FFFD, so counting those is wrong; count what "ignore" drops.
    replaced = len(data) - len(data.decode("utf-8", errors="ignore").encode()) if "\ufffd" in text else 0
    return text.removeprefix("\ufeff"), replaced


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _text_document(file: SourceFile, counts: CorpusCounts) -> Iterator[str]:
    try:
        with _open(file.path) as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.path, error) from error
    text, replaced = decode_utf8(data)
    counts.replaced_bytes += replaced
    counts.carriage_returns_removed += text.count("\r\n")
    yield text.replace("\r\n", "\n")


def _jsonl_documents(file: SourceFile, counts: CorpusCounts) -> Iterator[str]:
    try:
        with _open(file.path) as stream:
            for number, line in enumerate(stream, start=1):
                text, replaced = decode_utf8(line)
                counts.replaced_bytes += replaced
                if text.strip():
                    yield _text_of_line(text, file, number, counts)
                else:
                    counts.drop("blank jsonl line")
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.path, error) from error


def _text_of_line(line: str, file: SourceFile, number: int, counts: CorpusCounts) -> str:
    where = f"{file.path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line of a .jsonl file must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a JSON {type(row).__name__}, not an object; "
            f"write {{{json.dumps(file.text_field)}: ...}} on every line"
        )
    text = row.get(file.text_field)
    if not isinstance(text, str):
        has = (
            f"is {type(text).__name__}, not text"
            if file.text_field in row
            else f"is missing (the line has {', '.join(row) or 'no fields'})"
        )
        raise DataError(
            f"{where}: the field {file.text_field!r} {has}; set data.text_field to the field that holds the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        # UTF-16 joins surrogate pairs; an unpaired one becomes U+FFFD.
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        counts.replaced_surrogates += repaired.count("\ufffd") - text.count("\ufffd")
        return repaired
    return text
