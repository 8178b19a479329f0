"""Documents of .csv and .tsv: a row is one; a quoted text may have line ends.

After damage, and after a quote that never ends, reading goes on at the next line that is a row by itself, where there
are two columns or more: of one column any line is a row.
"""

import csv
import threading
from collections import deque
from collections.abc import Iterator

from trimaran.models.fields import counted
from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode, document_of
from trimaran.runtime.data.readers.streams import Stream, as_utf8, open_part

_LOCK = threading.Lock()
_PIECE = 1 << 20


class _TooLargeError(Exception):
    """A row of more bytes than are held."""


class _Lines:
    """The lines of a stream for csv.reader, which says where a row ends; `begin` and `size` are of the row so far.

    The row is held, to read its lines again where it never ends.
    """

    def __init__(self, stream: Stream, most_bytes: int) -> None:
        self._stream, self._most = stream, most_bytes
        self._row, self._again, self._is_cut = list[bytes](), deque[bytes](), False
        self.begin = self.size = self.quotes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._read(self._most + 1)
        if self.size > self._most:
            raise _TooLargeError
        if not line.endswith(b"\n"):
            if damage := self._damage():
                raise damage
            if self.quotes % 2 and len(self._row) > 1:
                self._again.extend(self._row[1:])
                self.size = len(self._row[0])
                raise Damage("read.damaged", "the file ends within a quoted text", self.begin)
        if not line:
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")

    def _read(self, most_bytes: int) -> bytes:
        line = self._again.popleft() if self._again else self._stream.readline(most_bytes)
        self.size += len(line)
        self.quotes += line.count(b'"')
        self._row += [line] if line else []
        return line

    def _damage(self) -> Damage | None:
        """Return why the bytes end too early, and have those after them come; the first line of these may be cut."""
        damage = self._stream.go_on(self.begin)
        if damage is not None:
            self.size += 1  # what was lost
            self._is_cut = True
        return damage

    def begin_row(self) -> None:
        """Say that the next line begins a row."""
        self.begin += self.size
        self.size = self.quotes = 0
        self._row = []

    def skip_row(self) -> Damage | None:
        """Pass over a row that is too large, to the end of a line where no quote is open: one within is doubled.

        Returns the damage that ends it, if any does.
        """
        line = self._row[-1]
        while not line.endswith(b"\n") or self.quotes % 2:
            self._row = []
            if not (line := self._read(_PIECE)):
                return self._damage()
        return None

    def skip_damage(self, delimiter: str, columns: int) -> int:
        """Pass over lines to the next that is a row by itself, or to the end; return how many."""
        skipped = 0
        while True:
            self.begin_row()
            is_cut, self._is_cut = self._is_cut, False
            line = self._read(self._most + 1)
            if not line.endswith(b"\n") and self._damage():
                is_cut = True
            elif not line:
                return skipped
            if not is_cut and _is_row(line, delimiter, columns):
                self._again.appendleft(line)
                self.size = 0
                return skipped
            skipped += bool(line)


def _is_row(line: bytes, delimiter: str, columns: int) -> bool:
    if not line.endswith(b"\n") or line.count(b'"') % 2:
        return False
    try:
        rows = list(csv.reader([line.decode("utf-8", "surrogateescape")], delimiter=delimiter))
    except csv.Error:
        return False
    return len(rows) == 1 and len(rows[0]) == columns


def _rows(source: _Lines, delimiter: str, most: int) -> Iterator[tuple[int, list[str] | Damage]]:
    """Yield where each row begins, and its values or why it has none."""
    rows, columns = csv.reader(source, delimiter=delimiter), 0
    while True:
        source.begin_row()
        begin, damage = source.begin, None
        try:
            values = next(rows, None)
        except _TooLargeError:
            yield begin, Damage("read.too_large", f"a row of more than {most:,} bytes, or a quote that never ends")
            damage = source.skip_row()
        except csv.Error as error:
            yield begin, Damage("read.not_csv", str(error))
        except Damage as found:
            damage = found
        else:
            if values is None:
                return
            yield begin, values
            columns = columns or len(values)
            continue
        if damage is not None and columns < 2:
            raise damage
        if damage is not None:
            skipped = counted(source.skip_damage(delimiter, columns), "line")
            yield begin, Damage(damage.reason, f"{damage.detail}; {skipped} passed over to the next row")
        rows = csv.reader(source, delimiter=delimiter)


def read_csv(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row below the first, which names the columns."""
    most = 2 * settings.max_document_bytes
    with _LOCK:  # the limit is the process's
        csv.field_size_limit(max(csv.field_size_limit(), 2 * most))
    names: list[str] = []
    with open_part(part) as stream:
        for begin, values in _rows(_Lines(as_utf8(stream), most), "\t" if part.format == "tsv" else ",", most):
            place = part.place(begin)
            if isinstance(values, Damage):
                yield Loss(place, values.reason, values.detail)
            elif not values:
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
