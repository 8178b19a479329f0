"""A part of a corpus, which one task reads, and what its reader is told and tells."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trimaran.runtime.data.corpus import check_nul, decode_utf8, repair_surrogates
from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.files import DataError


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a range of one, that is read by itself.

    Attributes:
        corpus: its name in `data.corpora`.
        file: path, or address such as s3://bucket/key.
        name: of the file in the ids of documents; it does not depend on where the corpus lies.
        format: one of `trimaran.runtime.data.readers.parts.FORMATS`.
        compression: suffix, such as .gz; "" for none.
        file_bytes: of the whole file.
        stamp: changes when the file does.
        index: number of the part in its corpus.
        start: where the part begins: a byte (lines of text), or the number of a row group (parquet), record batch
            (arrow) or document (megatron).
        stop: where it ends; None at the end of the file.
        part_bytes: about what is read of the file, to show progress by.
        member: where, in a packed file, the member begins at which reading does.
        member_place: the byte of the unpacked file that this member begins with, at `start` or before.
    """

    corpus: str
    file: str
    name: str
    format: str
    compression: str = ""
    file_bytes: int = 0
    stamp: str = ""
    index: int = 0
    start: int = 0
    stop: int | None = None
    part_bytes: int = 0
    member: int = 0
    member_place: int = 0

    @property
    def is_slice(self) -> bool:
        """Whether it is a range of a packed file."""
        return bool(self.compression) and (self.start > 0 or self.stop is not None)

    def place(self, at: int) -> str:
        """Return the id of the document that is number `at` of the file, or begins at its byte `at` when unpacked."""
        return f"{self.corpus}/{self.name}#{at}"


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What the spec says of reading one corpus.

    Attributes:
        text_field: field or column with the text, of .jsonl, .json, .csv, .parquet and .arrow.
        max_document_bytes: the most bytes of a document, in UTF-8 or of HTML; a larger one is skipped.
    """

    text_field: str = "text"
    max_document_bytes: int = 10 << 20


@dataclass(slots=True)
class Tally:
    """Changes, and records that are no documents, of one part: how often each, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, place: str, count: int = 1) -> None:
        """Count something by its reason."""
        if count:
            self.counts[reason] += count
            self.first.setdefault(reason, place)

    def losses(self) -> Iterator[Loss]:
        """Yield what was noted, each reason once."""
        for reason, count in self.counts.items():
            yield Loss(self.first[reason], reason, times=count, is_document=False)


Reader: TypeAlias = Callable[[Part, ReadSettings, Tally], Iterator[Document | Loss]]
"""Yields the documents of a part in order, with a Loss in the place of each that can't be read, and notes the rest.

Raises Damage where the file can't be read on, and OSError where it can't be reached: that may be tried again.
"""


class Damage(Exception):
    """The content of a file is damaged; what is whole before was yielded.

    Args:
        reason: `read.truncated` or `read.damaged`.
        detail: what was found.
        at: as for `Part.place`; None for where the reader was.
    """

    def __init__(self, reason: str, detail: str, at: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.at = reason, detail, at


def decode(data: bytes, part: Part, place: str, tally: Tally) -> str | Loss:
    """Return the text of UTF-8 bytes; a Loss where they are no text, or mostly in another encoding.

    Single bytes that are not UTF-8 become U+FFFD.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text, replaced = decode_utf8(data)
        if replaced > len(data) - len(text):  # more than all that is well-formed beyond ASCII
            kind = "read.binary" if _is_binary(text) else "read.wrong_charset"
            return Loss(place, kind, f"{replaced} bytes are not UTF-8, first at {error.start}")
        tally.note("read.not_utf8", place, replaced)
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        try:
            check_nul(part.file, text)
        except DataError as error:
            return Loss(place, "read.binary", str(error))
    return text


def _is_binary(text: str) -> bool:
    """Return whether a text that is not UTF-8 has the control characters that no encoding of text uses."""
    sample = text[:65536]
    return sum(map(sample.count, "\0\x01\x02\x03\x04\x05\x06\x0e\x0f\x10")) > len(sample) // 100


def document_of(row: object, place: str, part: Part, settings: ReadSettings, tally: Tally) -> Document | Loss:
    """Return the document that a row of a table or a JSON object is.

    Its fields `url` and `id` go along where they are text or a number.
    """
    if not isinstance(row, Mapping):
        return Loss(place, "read.no_object", f"{type(row).__name__} in the place of an object")
    name = settings.text_field
    if name not in row:
        return Loss(place, "read.no_field", f"no field {name!r} among {', '.join(map(str, row))[:200]}")
    text = row[name]
    if text is None:
        return Loss(place, "read.null")
    if not isinstance(text, str):
        return Loss(place, "read.not_text", f"the field {name!r} is {type(text).__name__}")
    text, repaired = repair_surrogates(text)
    tally.note("read.surrogate", place, repaired)
    url, number = row.get("url"), row.get("id")
    fields: dict[str, Any] = {"id": str(number)} if isinstance(number, str | int) else {}
    return Document(place, text, url=url if isinstance(url, str) else "", corpus=part.corpus, fields=fields)
