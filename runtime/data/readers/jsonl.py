"""Documents of .jsonl, one a line, and of .json, which has JSON lines, one record or a list of them."""

import json
from collections.abc import Iterator

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Part, ReadSettings, Tally, decode, document_of
from trimaran.runtime.data.readers.streams import as_utf8, lines, open_part
from trimaran.runtime.data.readers.text import text_lines
from trimaran.runtime.files import parse_json

# Other fields come along, and "\u00fc" stands for two bytes of UTF-8.
LINE_BYTES = 4


def read_jsonl(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of each line that begins in the part's range of bytes."""
    for line in text_lines(part, LINE_BYTES * settings.max_document_bytes, tally):
        if isinstance(line, Loss):
            yield line
            continue
        place, text = line
        try:
            row = parse_json(text)
        except ValueError as error:
            yield Loss(place, "read.not_json", str(error))
        else:
            yield document_of(row, place, part, settings, tally)


def read_json(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the documents of a .json file: JSON lines, or one record or a list of them, which is held in memory.

    A list may have as many bytes as 64 of the largest documents.
    """
    most = 64 * settings.max_document_bytes
    with open_part(part) as stream:
        utf8 = as_utf8(stream)
        found = (each for each in lines(utf8, LINE_BYTES * settings.max_document_bytes) if isinstance(each, tuple))
        first = next((line for _, line in found if line is None or line.strip()), None)
        if first is not None and _is_object(first):
            yield from read_jsonl(part, settings, tally)
            return
    with open_part(part) as stream:
        utf8 = as_utf8(stream)
        content = utf8.read(most + 1)
        if len(content) > most:
            yield Loss(part.place(0), "read.too_large", f"a list of more than {most:,} bytes; write a line a record")
            return
        utf8.check(0)
    text = decode(content, part, part.place(0), tally)
    if isinstance(text, Loss):
        yield text
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        yield Loss(part.place(0), "read.not_json", str(error))
        return
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        yield document_of(row, part.place(number), part, settings, tally)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
