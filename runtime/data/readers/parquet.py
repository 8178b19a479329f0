"""Documents of .parquet: a row is one. A part is a range of row groups."""

from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode, document_of
from trimaran.runtime.data.readers.streams import open_table

# Of texts that are held at a time.
_BATCH_BYTES: Final = 32 << 20
_MOST_ROWS: Final = 1024
# Without a buffer, all that a row group has of a column is read at once.
_READ_BYTES: Final = 1 << 20


def _open(file: BinaryIO, text_field: str) -> Any:
    """Return pyarrow's file; Damage where it has no end, where a parquet file says what it holds."""
    require_extra("pyarrow")
    import pyarrow.parquet

    try:
        try:
            # A text that many rows share is held once: 1 MB in a million rows would be a terabyte.
            table = pyarrow.parquet.ParquetFile(file, read_dictionary=[text_field], buffer_size=_READ_BYTES)
        except KeyError:  # no such column, as the reader will tell
            table = pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES)
        _ = table.schema_arrow.names  # an error here where names are damaged
        return table
    except arrow_errors() as error:
        if getattr(error, "errno", None) is not None:
            raise
        file.seek(0)
        reason = "read.truncated" if file.read(4) == b"PAR1" else "read.damaged"
        raise Damage(reason, f"{error} A parquet file without its end can't be read", 0) from error


def split_parquet(part: Part, settings: ReadSettings, part_bytes: int) -> list[tuple[int, int, int]]:
    """Return (first row group, end, bytes) of parts of about `part_bytes` of text."""
    with open_table(part) as file:
        table = _open(file, settings.text_field)
        ranges, start, size = [], 0, 0
        for index in range(table.metadata.num_row_groups):
            size += _text_bytes(table, index, settings.text_field)
            if size >= part_bytes or index + 1 == table.metadata.num_row_groups:
                ranges.append((start, index + 1, size))
                start, size = index + 1, 0
    return ranges


def _text_bytes(table: Any, index: int, text_field: str) -> int:
    """Return the bytes of the texts of a row group, of all columns where there is no such column."""
    group, names = table.metadata.row_group(index), table.schema_arrow.names
    chosen = [names.index(text_field)] if text_field in names and len(names) == group.num_columns else None
    return sum(group.column(number).total_uncompressed_size for number in chosen or range(group.num_columns))


def read_parquet(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row of the part's row groups; a group that is damaged is one Loss of its rows."""
    with open_table(part) as file:
        table = _open(file, settings.text_field)
        metadata, names = table.metadata, table.schema_arrow.names
        if settings.text_field not in names:
            detail = f"no column {settings.text_field!r} among {', '.join(names)[:200]}"
            yield Loss(part.place(0), "read.no_field", detail, max(1, metadata.num_rows))
            return
        groups = range(part.start, metadata.num_row_groups if part.stop is None else part.stop)
        row = sum(metadata.row_group(index).num_rows for index in range(part.start))
        for index in groups:
            group = metadata.row_group(index)
            end, done = row + group.num_rows, row
            try:
                for document in _rows(table, index, row, part, settings, tally):
                    yield document
                    done += 1
            except arrow_errors() as error:
                if getattr(error, "errno", None) is not None:
                    raise
                yield Loss(part.place(done), "read.damaged", f"row group {index}: {error}", end - done)
            row = end


def arrow_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged data. An OSError with a number is the file's own."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError)


def _rows(
    table: Any, index: int, row: int, part: Part, settings: ReadSettings, tally: Tally
) -> Iterator[Document | Loss]:
    group = table.metadata.row_group(index)
    mean = _text_bytes(table, index, settings.text_field) // max(1, group.num_rows) + 1
    columns = [name for name in dict.fromkeys((settings.text_field, "url", "id")) if name in table.schema_arrow.names]
    rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // mean))
    for batch in table.iter_batches(batch_size=rows, row_groups=[index], columns=columns):
        yield from documents_of(batch, row, part, settings, tally)
        row += batch.num_rows


def documents_of(batch: Any, row: int, part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the document of every row of an Arrow record batch, whose first is number `row` of the file."""
    names = [name for name in dict.fromkeys((settings.text_field, "url", "id")) if name in batch.schema.names]
    try:
        columns = {name: _checked(batch.column(name)) for name in names}
    except arrow_errors() as error:
        yield Loss(part.place(row), "read.damaged", str(error), batch.num_rows)
        return
    texts = columns.pop(settings.text_field)
    for offset in range(batch.num_rows):
        place, text = part.place(row + offset), _text(texts[offset], settings.max_document_bytes)
        if isinstance(text, Loss):
            yield text._replace(place=place)
            continue
        if isinstance(text, bytes):
            text = decode(text, part, place, tally)
            if isinstance(text, Loss):
                yield text
                continue
        values = {settings.text_field: text} | {name: _value(column[offset]) for name, column in columns.items()}
        yield document_of(values, place, part, settings, tally)


def _checked(column: Any) -> Any:
    """Return a column whose texts are bytes, which may be no UTF-8, and lie within its memory.

    pyarrow itself does not look where texts begin and end: damaged offsets end the process.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        return pyarrow.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    column = column.view(binary.get(column.type, column.type))
    column.validate(full=True)
    return column


def _value(scalar: Any) -> object:
    value = scalar.as_py()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _text(scalar: Any, most_bytes: int) -> object:
    """Return the bytes of a text, the value of what is none, and a Loss for a text that is too large to be copied."""
    scalar = getattr(scalar, "value", scalar) if hasattr(scalar, "index") else scalar
    buffer = scalar.as_buffer() if hasattr(scalar, "as_buffer") else None
    if buffer is None:
        return None if scalar is None else scalar.as_py()
    return buffer.to_pybytes() if buffer.size <= most_bytes else Loss("", "read.too_large", f"{buffer.size:,} bytes")
