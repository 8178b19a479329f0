"""Documents of .csv and .tsv: a row is one; a quoted text may have line ends."""

import csv
import threading
from collections.abc import Iterator

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode, document_of
from trimaran.runtime.data.readers.streams import as_utf8, lines, open_part

_LOCK = threading.Lock()


def read_csv(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row below the first, which names the columns."""
    most = 2 * settings.max_document_bytes
    with _LOCK:  # the limit is the process's
        csv.field_size_limit(max(csv.field_size_limit(), 2 * most))
    delimiter = "\t" if part.format == "tsv" else ","
    names: list[str] = []
    with open_part(part) as stream:
        for at, record in _records(lines(as_utf8(stream), most), most):
            place = part.place(at)
            if record is None:
                yield Loss(place, "read.too_large", f"a row of more than {most:,} bytes, or a quote that never ends")
                continue
            if not record.strip():
                tally.note("read.blank", place)
                continue
            text = decode(record, part, place, tally)
            if isinstance(text, Loss):
                yield text
                continue
            try:
                values = next(csv.reader(text.splitlines(keepends=True), delimiter=delimiter))
            except (csv.Error, StopIteration) as error:
                yield Loss(place, "read.not_csv", str(error))
                continue
            if not names:
                names = values
                if settings.text_field not in names:
                    yield Loss(
                        place, "read.no_field", f"no column {settings.text_field!r} among {', '.join(names)[:200]}"
                    )
                    return
            elif len(values) != len(names):
                yield Loss(place, "read.not_csv", f"{len(values)} values in {len(names)} columns")
            else:
                yield document_of(dict(zip(names, values, strict=True)), place, part, settings, tally)


def _records(found: Iterator[tuple[int, bytes | None]], most_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, bytes) of each row: lines up to one where no quote is open; None for a row of more bytes.

    A quote within a quoted text is doubled, so a quote is open where their number is odd. Raises Damage where the file
    ends within one.
    """
    begin, size, quotes = 0, 0, 0
    held: list[bytes] | None = []
    for at, line in found:
        if not size:
            begin = at
        size += len(line) if line is not None else most_bytes + 1
        quotes += line.count(b'"') if line is not None else 0
        if size > most_bytes:
            held = None
        elif held is not None and line is not None:
            held.append(line)
        if quotes % 2 == 0:
            yield begin, None if held is None else b"".join(held)
            size, quotes, held = 0, 0, []
    if size:
        raise Damage("read.damaged", "the file ends within a quoted text", begin)
