"""Records of .json, .jsonl, .csv and .parquet files, or .gz of one: evaluation sets, which fit in memory. No torch."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import MOST_BYTES, check_regular, parse_json, read_bytes

READABLE: Final = ".json, .jsonl, .csv, .parquet, or .gz of one"
Numbered = Iterator[tuple[str, Any]]
"""The place of a record in its file, such as "line 3", and the record."""


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read; None for a file that holds no records."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in _RECORDS if name.endswith(kind)), None)


def read_records(
    path: Path, content: bytes | None = None, *, csv_fields: list[str] | None = None
) -> list[tuple[str, Any]]:
    """Return the records of a file, each with its place in it: the line, or the number of the record from 1.

    Args:
        content: of the file, where it was read already (`read_content`).
        csv_fields: names of the columns of a .csv file without a row of names.

    Raises:
        DataError: the file is missing, can't be read, or is of another kind.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path} is no evaluation set of a known kind; use {READABLE}")
    try:
        data = read_content(path) if content is None else content
        return list(_csv_records(data, csv_fields) if kind == ".csv" else _RECORDS[kind](data))
    except (ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, kind, error) from error


def read_content(path: Path) -> bytes:
    """Return the bytes of a file, unpacked; DataError where it can't be read."""
    try:
        if not path.name.lower().endswith(".gz"):
            return read_bytes(path)
        with gzip.open(check_regular(path)) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB, too much for an evaluation set")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; name one that is there") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unreadable(path, kind_of(path) or "an evaluation set", error) from error
    return content


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"cannot read {path} as {kind}: {reason}; use {READABLE}")


def _json_lines(content: bytes) -> Numbered:
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error


def _json(content: bytes) -> Numbered:
    text = content.decode("utf-8-sig")
    try:
        value = parse_json(text)
    except ValueError:
        if text.strip().startswith("["):
            raise
        yield from _json_lines(content)  # as the `datasets` package writes .json
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"record {number}", record


def _csv_records(content: bytes, fields: list[str] | None = None) -> Numbered:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), fields, strict=True)
    for record in reader:
        if None in record or None in record.values():
            raise ValueError(f"line {reader.line_num} has not as many values as there are columns")
        yield f"line {reader.line_num}", record


def _parquet_records(content: bytes) -> Numbered:
    require_extra("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(pa.BufferReader(content)).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    yield from ((f"record {number}", record) for number, record in enumerate(records, start=1))


_RECORDS: Final[dict[str, Callable[[bytes], Numbered]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
