"""Documents of .csv and .tsv: a row is one; a quoted text may have line ends."""

import csv
import threading
from collections.abc import Iterator

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode, document_of
from trimaran.runtime.data.readers.streams import Stream, as_utf8, open_part

_LOCK = threading.Lock()
_PIECE = 1 << 20


class _TooLargeError(Exception):
    """A row of more bytes than are held."""


class _Lines:
    """The lines of a stream for csv.reader, which says where a row ends; `begin` and `size` are of the row so far."""

    def __init__(self, stream: Stream, most_bytes: int) -> None:
        self._stream, self._most, self._last = stream, most_bytes, b""
        self.begin = self.size = self.lines = self.quotes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._read(self._most + 1)
        if self.size > self._most:
            raise _TooLargeError
        if not line.endswith(b"\n"):
            self._stream.check(self.begin)
            if self.quotes % 2 and self.lines > 1:
                raise Damage("read.damaged", "the file ends within a quoted text", self.begin)
        if not line:
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")

    def _read(self, most_bytes: int) -> bytes:
        line = self._stream.readline(most_bytes)
        self.size += len(line)
        self.quotes += line.count(b'"')
        self.lines += bool(line)
        self._last = line
        return line

    def begin_row(self) -> None:
        """Say that the next line begins a row."""
        self.begin += self.size
        self.size = self.lines = self.quotes = 0

    def skip_row(self) -> None:
        """Pass over a row that is too large, to the end of a line where no quote is open: one within is doubled."""
        line = self._last
        while not line.endswith(b"\n") or self.quotes % 2:
            if not (line := self._read(_PIECE)):
                self._stream.check(self.begin)
                return


def read_csv(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row below the first, which names the columns."""
    most = 2 * settings.max_document_bytes
    with _LOCK:  # the limit is the process's
        csv.field_size_limit(max(csv.field_size_limit(), 2 * most))
    delimiter = "\t" if part.format == "tsv" else ","
    names: list[str] = []
    with open_part(part) as stream:
        source = _Lines(as_utf8(stream), most)
        rows = csv.reader(source, delimiter=delimiter)
        while True:
            source.begin_row()
            place = part.place(source.begin)
            try:
                values = next(rows, None)
            except _TooLargeError:
                source.skip_row()
                yield Loss(place, "read.too_large", f"a row of more than {most:,} bytes, or a quote that never ends")
                rows = csv.reader(source, delimiter=delimiter)
                continue
            except csv.Error as error:
                yield Loss(place, "read.not_csv", str(error))
                rows = csv.reader(source, delimiter=delimiter)
                continue
            if values is None:
                return
            if not values:
                tally.note("read.blank", place)
            elif not names:
                names = [value.removeprefix("\ufeff") for value in values]
                if settings.text_field not in names:
                    detail = f"no column {settings.text_field!r} among {', '.join(names)[:200]}"
                    yield Loss(place, "read.no_field", detail)
                    return
            elif len(values) != len(names):
                yield Loss(place, "read.not_csv", f"{len(values)} values in {len(names)} columns")
            else:
                row = dict(zip(names, values, strict=True))
                text = decode(row[settings.text_field].encode("utf-8", "surrogateescape"), part, place, tally)
                row |= {} if isinstance(text, Loss) else {settings.text_field: text}
                yield text if isinstance(text, Loss) else document_of(row, place, part, settings, tally)
