"""From the files of a corpus to text: read documents, cut long ones into sections, note what is left out or changed."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.data.sources import SECTION_CHARACTERS, SourceFile
from trimaran.runtime.files import check_regular, parse_json

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s+")
# UTF-32's little-endian mark begins with that of UTF-16.
MARKS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# First bytes of data that is packed or no text at all, and the suffix with which it would be unpacked.
_NO_TEXT: Final = (
    (rb"\x1f\x8b", "gzip", ".gz"),
    (rb"BZh[1-9]1AY&", "bzip2", ".bz2"),
    (rb"\xfd7zXZ\0", "xz", ".xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd", ""),
    (rb"PK\x03\x04", "zip", ""),
    (rb"%PDF-\d", "PDF", ""),
    (rb"PAR1\x15", "Parquet", ""),
)
# Of English in UTF-16 half of the bytes are NUL, of Chinese a twentieth (those of spaces and line ends).
_MOST_NUL = 0.03
# Where most other bytes are no UTF-8, far fewer tell: Japanese has a line end for each thirty signs.
_MOST_NUL_BESIDE = 0.003
_LIKE_UTF16 = "looks like UTF-16 or UTF-32 without a byte order mark, or like a damaged file; convert it to UTF-8"
_OPEN: Final[dict[str, Callable[..., io.BufferedReader]]] = {
    "": open,
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
}


@dataclass(frozen=True, slots=True)
class Unit:
    """A document, or one section of a long document.

    `continues`: it directly follows the unit before it in the same document. `place`: its file, and the line where that
    has several documents. `tokens`: of a document that came as token ids, which has no text; a list or an array.
    """

    text: str
    continues: bool
    place: str = field(default="", compare=False)
    tokens: Sequence[int] | npt.NDArray[np.integer[Any]] = ()

    @property
    def size(self) -> int:
        """Characters of the text, about; of tokens as many as English has."""
        return len(self.text) + 4 * len(self.tokens)


def iter_units(files: Sequence[SourceFile], account: Account, limit: int = SECTION_CHARACTERS) -> Iterator[Unit]:
    """Yield every unit of the corpus in order and update `account`.

    A .txt file is one document and is held in memory whole, as is a .json file unless it has JSON lines; these are read
    one by one. Documents of white space only, and those whose text is null, are left out. Raises DataError naming the
    file, and the line, that can't be read.

    Args:
        limit: the most characters of a section.
    """
    for file in files:
        account.totals["files"] += 1
        for document, place in _documents(file, account):
            account.totals["records"] += 1
            if document is None or not document.strip():
                account.note("null" if document is None else "empty", place)
                continue
            account.note("nul", place, document.count("\0"))
            yield from units_of(document, place, account, limit)


def units_of(document: str, place: str, account: Account, limit: int) -> Iterator[Unit]:
    """Yield the units of a document and count it in `account`."""
    sections = split_sections(document, limit)
    size = len(document.encode())
    account.totals.update(documents=1, characters=len(document), bytes=size, units=len(sections))
    for index, section in enumerate(sections):
        yield Unit(section, index > 0, place)


def split_sections(text: str, limit: int = SECTION_CHARACTERS) -> list[str]:
    """Return sections that join to exactly `text`, cut at blank lines, each as long as `limit` characters allow.

    A paragraph that is longer than that is cut at line ends (verse and one-sentence-a-line corpora may have no blank
    line at all). A single line is cut, at white space, only by a limit below SECTION_CHARACTERS, as small corpora have.
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

    These are the ends of blank lines; in paragraphs above `limit` those of lines, in lines above it those of white
    space; and the end of the text.
    """
    levels = (_BLANK_LINES, _LINE_END, _SPACE) if limit < SECTION_CHARACTERS else (_BLANK_LINES, _LINE_END)
    yield from _cuts_between(text, 0, len(text), limit, levels)


def _cuts_between(text: str, start: int, end: int, limit: int, levels: Sequence[re.Pattern[str]]) -> Iterator[int]:
    for cut in chain((match.end() for match in levels[0].finditer(text, start, end - 1)), [end]):
        if cut - start > limit and levels[1:]:
            yield from _cuts_between(text, start, cut, limit, levels[1:])
        else:
            yield cut
        start = cut


class _Decoder:
    """Decodes the pieces of one UTF-8 file and counts the bytes that are not UTF-8, which become U+FFFD."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._replaced = self._touched = self._multibyte = self._lines = self._bytes = self._nul = 0
        self._first = ""

    def decode(self, data: bytes) -> str:
        text, replaced = decode_utf8(data)
        self._bytes += len(data)
        self._nul += data.count(0)
        self._multibyte += len(data) - len(text)
        if replaced:
            self._replaced += replaced
            self._touched += sum(len(line) for line in text.split("\n") if "\ufffd" in line)
            line = self._lines + text.count("\n", 0, text.index("\ufffd")) + 1
            self._first = self._first or f"{self._file.path}, line {line}"
        self._lines += text.count("\n")
        return text

    def close(self, account: Account) -> None:
        """Note what was replaced.

        Where most characters beyond ASCII can't be read, the file is in another encoding and the lines that have them
        are lost; otherwise the bytes alone are. Raises DataError where that encoding can be told.
        """
        if self._replaced > self._multibyte and self._nul > _MOST_NUL_BESIDE * self._bytes:
            raise DataError(f"{self._file.path} {_LIKE_UTF16} ({self._nul:,} NULs)")
        lost = self._touched if self._replaced > self._multibyte else self._replaced
        account.note("not_utf8", self._first, self._replaced, lost)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """Return (text, number of bytes that were not UTF-8 and were replaced by U+FFFD).

    A leading byte order mark is removed.
    """
    text = data.decode("utf-8", errors="replace")
    # The decoder merges up to three bad bytes into one U+FFFD, so counting those is wrong; count what "ignore" drops.
    replaced = len(data) - len(data.decode("utf-8", errors="ignore").encode()) if "\ufffd" in text else 0
    return text.removeprefix("\ufeff"), replaced


def repair_surrogates(text: str) -> tuple[str, int]:
    """Return (text, number of surrogates without their other half, which become U+FFFD); pairs are joined."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return repaired, repaired.count("\ufffd") - text.count("\ufffd")
    return text, 0


def repair_texts(value: Any) -> tuple[Any, int]:
    """Return (a JSON value whose texts are those of `repair_surrogates`, number of surrogates without their half)."""
    if isinstance(value, str):
        return repair_surrogates(value)
    if isinstance(value, Mapping):
        pairs = [(repair_texts(key), repair_texts(each)) for key, each in value.items()]
        return {key: each for (key, _), (each, _) in pairs}, sum(one + two for (_, one), (_, two) in pairs)
    if isinstance(value, list | tuple):
        parts = [repair_texts(each) for each in value]
        return [each for each, _ in parts], sum(count for _, count in parts)
    return value, 0


def check_is_text(path: Path, start: bytes) -> None:
    """Raise DataError where a file begins as packed data does, or as another kind of data that is no text."""
    for mark, kind, suffix in _NO_TEXT:
        if re.match(mark, start):
            fix = f"name it {path.name}{suffix}, or unpack it" if suffix not in path.suffixes else "unpack it"
            raise DataError(f"{path} holds {kind} data instead of text; {fix if suffix else 'convert it to text'}")


def check_nul(path: Path | str, text: str) -> None:
    """Raise DataError where a text has more NULs than any, as another encoding that is read as UTF-8 has."""
    if text.count("\0") > _MOST_NUL * len(text):
        share = f"{text.count(chr(0)) / len(text):.0%} of its characters are NUL"
        raise DataError(f"{path} {_LIKE_UTF16} ({share})")


def _documents(file: SourceFile, account: Account) -> Iterator[tuple[str | None, str]]:
    """Yield the text, or None for null, and the place of every document of a file."""
    try:
        with _OPEN[file.compression](check_regular(file.path), "rb") as stream:
            check_is_text(file.path, stream.peek(8))
            encoding = next((name for mark, name in MARKS if stream.peek(4).startswith(mark)), "")
            decoder, size = _Decoder(file), file.path.stat().st_size
            account.totals["file_bytes"] += size
            if encoding:
                account.note("utf16", str(file.path), amount=size)
                lines: Iterable[str] = io.TextIOWrapper(stream, encoding, newline="\n")
            else:
                lines = map(decoder.decode, stream if file.kind != "txt" else [stream.read()])
            if file.kind == "txt":
                yield _text("".join(lines), file, account), str(file.path)
            else:
                for row, place in (_json_rows if file.kind == "jsonl" else _rows_of_json)(lines, file, account):
                    yield _text_of_row(row, file, place, account), place
            decoder.close(account)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} begins like {error.encoding.upper()} and is damaged ({error.reason}); convert it to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(file.path, error) from error


def _text(text: str, file: SourceFile, account: Account) -> str:
    check_nul(file.path, text)
    account.note("crlf", str(file.path), text.count("\r\n"))
    return text.replace("\r\n", "\n")


def _json_rows(lines: Iterable[str], file: SourceFile, account: Account) -> Iterator[tuple[object, str]]:
    """Yield the value and the place of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        place = f"{file.path}, line {number}"
        if line.strip():
            yield _parse(line, place, "every line of a .jsonl file must be one JSON object"), place
        else:
            account.note("blank", place)


def _rows_of_json(lines: Iterable[str], file: SourceFile, account: Account) -> Iterator[tuple[object, str]]:
    """Yield the records of a .json file, which has JSON lines or is one record or a list of them.

    A file whose first record has no text is passed over: many a corpus has one that describes it.
    """
    lines, head = iter(lines), []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if head and _is_object(head[-1]):
        rows = _json_rows(chain(head, lines), file, account)
    else:
        content = "".join(chain(head, lines))
        value = _parse(content, str(file.path), "write a JSON object on every line, or a list of them") if head else []
        records = value if isinstance(value, list) else [value]
        rows = ((record, f"{file.path}, record {number}") for number, record in enumerate(records, start=1))
    first = next(rows, None)
    if first is None or not isinstance(first[0], dict) or file.text_field not in first[0]:
        account.note("no_records", str(file.path), amount=file.path.stat().st_size)
    else:
        yield from chain([first], rows)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _parse(text: str, place: str, remedy: str) -> object:
    try:
        value: object = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{place}: {_LIKE_UTF16}" if "\0" in text else f"{place}: not JSON ({error}); {remedy}"
        ) from error
    return value


def _text_of_row(row: object, file: SourceFile, place: str, account: Account) -> str | None:
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: {_json_name(row)}, not an object; write {{{json.dumps(file.text_field)}: ...}} on every line"
        )
    text = row.get(file.text_field)
    if file.text_field in row and text is None:
        return None
    if not isinstance(text, str):
        has = (
            f"is {_json_name(text)}, not text"
            if file.text_field in row
            else f"is missing (the line has {', '.join(row) or 'no fields'})"
        )
        raise DataError(f"{place}: the field {file.text_field!r} {has}; set data.text_field to the field with the text")
    text, repaired = repair_surrogates(text)
    account.note("surrogate", place, repaired)
    return text


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
