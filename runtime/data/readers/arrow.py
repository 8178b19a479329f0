"""Documents of .arrow, as in the folders that `datasets` saves: a row is one. A part is a range of record batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.readers.parquet import arrow_errors, documents_of
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally
from trimaran.runtime.data.readers.streams import is_remote, open_part, open_raw, open_table
from trimaran.runtime.files import check_regular

_FILE_MARK = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def split_arrow(part: Part, settings: ReadSettings, part_bytes: int) -> list[tuple[int, int, int]]:
    """Return (first record batch, end, bytes) of parts of about `part_bytes`, of a local file that isn't packed."""
    ranges, start, size, number = [], 0, 0, 0
    try:
        for number, batch in enumerate(_batches(part), start=1):
            size += batch.nbytes
            if size >= part_bytes:
                ranges.append((start, number, size))
                start, size = number, 0
    except Damage:
        return [(0, number + 1, part.file_bytes)]  # whoever reads it tells
    return [*ranges, (start, number, size)] if number > start else ranges


def _batches(part: Part) -> Iterator[Any]:
    """Yield every record batch. Raises Damage where one is not whole, or the mark at the end is missing."""
    require_extra("pyarrow")
    import pyarrow

    with open_part(part) as stream:
        is_file = stream.peek(8).startswith(_FILE_MARK)
    if is_remote(part.file) or part.compression:
        source = open_table(part) if is_file else open_part(part)
    else:
        source = pyarrow.memory_map(str(check_regular(Path(part.file))))
    try:
        with source:
            table = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            _ = table.schema.names  # an error here where names are damaged
            yield from map(table.get_batch, range(table.num_record_batches)) if is_file else table
    except arrow_errors() as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Damage("read.truncated" if _is_cut(part, is_file) else "read.damaged", str(error)) from error
    if not is_file and _is_cut(part, is_file):
        raise Damage("read.truncated", "the mark at the end of the stream is missing")


def _is_cut(part: Part, is_file: bool) -> bool:
    """Return whether the last bytes are not those that a whole file has."""
    end = _FILE_MARK if is_file else _END_OF_STREAM
    if not part.compression:
        with open_raw(part) as file:
            file.seek(-min(len(end), part.file_bytes), 2)
            return file.read() != end
    with open_part(part) as stream:
        last = b""
        while block := stream.read(1 << 20):
            last = (last + block)[-len(end) :]
        stream.check(0)
        return last != end


def read_arrow(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row of the part's record batches."""
    row = 0
    try:
        for number, batch in enumerate(_batches(part)):
            if part.stop is not None and number >= part.stop:
                return
            if settings.text_field not in batch.schema.names:
                detail = f"no column {settings.text_field!r} among {', '.join(batch.schema.names)[:200]}"
                yield Loss(part.place(row), "read.no_field", detail, batch.num_rows)
            elif number >= part.start:
                yield from documents_of(batch, row, part, settings, tally)
            row += batch.num_rows
    except Damage as damage:
        raise Damage(damage.reason, damage.detail, row) from damage
