"""Reads a part of a corpus, whatever its format."""

from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import Final

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.arrow import read_arrow
from trimaran.runtime.data.readers.csv import read_csv
from trimaran.runtime.data.readers.html import read_html
from trimaran.runtime.data.readers.jsonl import read_json, read_jsonl
from trimaran.runtime.data.readers.megatron import read_megatron
from trimaran.runtime.data.readers.parquet import read_parquet
from trimaran.runtime.data.readers.part import Damage, Part, Reader, ReadSettings, Tally
from trimaran.runtime.data.readers.text import read_lines, read_text
from trimaran.runtime.data.readers.warc import read_warc

READERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "warc": read_warc,
        "wet": read_warc,
        "html": read_html,
        "txt": read_text,
        "lines": read_lines,
        "jsonl": read_jsonl,
        "json": read_json,
        "csv": read_csv,
        "tsv": read_csv,
        "parquet": read_parquet,
        "arrow": read_arrow,
        "megatron": read_megatron,
    }
)


def read_part(part: Part, settings: ReadSettings) -> Generator[Document | Loss, None, None]:
    """Yield the documents of a part in order, a Loss in the place of each that can't be read, then what was changed.

    Of a damaged file, what is whole before the damage is yielded, and what comes after where its begin can be found;
    each stretch between is one Loss. The same part gives the same documents again, whatever the settings of others.

    Raises:
        OSError: the file can't be reached, or has changed since the part was made; it names the file. A remote file
            that is gone midway is such an error. To read it again may do.
    """
    tally = Tally()
    try:
        for found in READERS[part.format](part, settings, tally):
            yield _finished(found, settings, tally) if isinstance(found, Document) else found
    except Damage as damage:
        yield Loss(part.place(part.start if damage.at is None else damage.at), damage.reason, damage.detail)
    yield from tally.losses()


def _finished(document: Document, settings: ReadSettings, tally: Tally) -> Document | Loss:
    """Return a document with newlines at the ends of lines; a Loss where it has no text, or too much."""
    if document.raw or "tokens" in document.fields:
        return document
    text, most = document.text, settings.max_document_bytes
    if "\r" in text:  # one byte is found at ten times the speed of two
        tally.note("read.crlf", document.id, text.count("\r\n"))
        text = document.text = text.replace("\r\n", "\n")
    if not text or text.isspace():
        return Loss(document.id, "read.empty")
    if 4 * len(text) > most and len(text.encode()) > most:
        return Loss(document.id, "read.too_large", f"more than {most:,} bytes")
    return document
