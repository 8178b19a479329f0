"""Documents of .txt: a file is one, and of the format `lines`: each line is one."""

from collections.abc import Iterator
from pathlib import Path

from trimaran.runtime.data.corpus import check_is_text
from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode
from trimaran.runtime.data.readers.streams import as_utf8, lines, open_part


def read_text(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document that the file is."""
    place, most = part.place(0), settings.max_document_bytes
    with open_part(part) as stream:
        try:
            check_is_text(Path(part.file), stream.peek(8))
        except DataError as error:
            yield Loss(place, "read.binary", str(error))
            return
        utf8 = as_utf8(stream)
        content = utf8.read(most + 1)
        if len(content) > most:
            yield Loss(place, "read.too_large", f"more than {most:,} bytes")
            return
        utf8.check(0)
    text = decode(content, part, place, tally)
    yield text if isinstance(text, Loss) else Document(place, text, corpus=part.corpus)


def read_lines(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of each line that begins in the part's range of bytes."""
    after_damage = False
    for line in text_lines(part, settings.max_document_bytes, tally):
        if isinstance(line, Loss):
            yield line
            after_damage = line.reason == "read.damaged"
            continue
        place, text = line
        if after_damage:
            yield Loss(place, "read.damaged", "a line that may have begun in the damaged bytes")
        else:
            yield Document(place, text.rstrip("\r\n"), corpus=part.corpus)
        after_damage = False


def text_lines(part: Part, most: int, tally: Tally) -> Iterator[tuple[str, str] | Loss]:
    """Yield (place, text with its end) of each line that begins in the part's range and is not blank.

    Args:
        most: bytes of the longest line; for a longer one, one that is no text, and damage a Loss is yielded.
    """
    with open_part(part) as stream:
        utf8 = stream if part.is_slice else as_utf8(stream)
        for found in lines(utf8, most, part.start, part.stop, is_there=part.is_slice):
            if isinstance(found, Damage):
                yield Loss(part.place(found.at or 0), found.reason, found.detail)
                continue
            at, line = found
            place = part.place(at)
            if line is None:
                yield Loss(place, "read.too_large", f"a line of more than {most:,} bytes")
            elif not line.strip():
                tally.note("read.blank", place)
            else:
                text = decode(line, part, place, tally)
                yield text if isinstance(text, Loss) else (place, text)
