"""Documents between two stages: Parquet files of the documents that are kept, and of those that are not, with why."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from trimaran.runtime.data.document import TOKENS, Document, Removal
from trimaran.runtime.data.extras import require_extra

if TYPE_CHECKING:
    import pyarrow

KEPT: Final = "kept.parquet"
REMOVED: Final = "removed.parquet"
_GROUP_BYTES = 8 << 20
_BATCH_ROWS: Final = 256
_EXCERPT_CHARACTERS = 1000
_TEXT_COLUMNS: Final = ("id", "corpus", "url", "language", "text", "fields", "tokens")
_BINARY: Final = ("tokens",)  # of documents that came as token ids: uint32
_REMOVED_COLUMNS: Final = ("id", "corpus", "url", "language", "stage", "reason", "detail", "excerpt")


@dataclass(frozen=True, slots=True)
class Removed:
    """A document that is not kept.

    Attributes:
        stage: of the recipe, where it ended.
        excerpt: the beginning of its text.
    """

    id: str
    corpus: str
    url: str
    language: str
    stage: str
    reason: str
    detail: str
    excerpt: str

    @staticmethod
    def of(document: Document, stage: str, removal: Removal) -> "Removed":
        """Return the record of a document that is removed."""
        excerpt = document.text[:_EXCERPT_CHARACTERS]
        if not excerpt and document.raw:
            excerpt = document.raw[:_EXCERPT_CHARACTERS].decode("utf-8", "replace")
        return Removed(
            document.id,
            document.corpus,
            document.url,
            document.language,
            stage,
            removal.reason,
            removal.detail,
            printable_utf8(excerpt),
        )


def printable_utf8(text: str) -> str:
    """Return `text` with half surrogate pairs replaced, as Parquet holds UTF-8 only."""
    return text.encode("utf-8", "replace").decode()


def _whole(value: str | bytes) -> str | bytes:
    return printable_utf8(value) if isinstance(value, str) else value


class _Table:
    """Writes rows of text columns to a Parquet file, in row groups of a bounded size."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        require_extra("pyarrow")
        import pyarrow
        import pyarrow.parquet

        types = {True: pyarrow.large_binary(), False: pyarrow.large_string()}
        self._schema = pyarrow.schema([(name, types[name in _BINARY]) for name in columns])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._columns: dict[str, list[str | bytes]] = {name: [] for name in columns}
        self._bytes = self._flushed = 0

    @property
    def size(self) -> int:
        """Bytes of the rows that were written so far, about."""
        return self._flushed + self._bytes

    def write(self, row: tuple[str | bytes, ...]) -> None:
        for values, value in zip(self._columns.values(), row, strict=True):
            values.append(value)
        self._bytes += sum(map(len, row))
        if self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        try:
            table = pyarrow.table(self._columns, schema=self._schema)
        except UnicodeEncodeError:  # half a surrogate pair, as in an address or in the name of a file
            whole = {name: [_whole(value) for value in values] for name, values in self._columns.items()}
            table = pyarrow.table(whole, schema=self._schema)
        self._writer.write_table(table)
        self._columns = {name: [] for name in self._columns}
        self._flushed += self._bytes
        self._bytes = 0

    def close(self) -> None:
        if self._bytes or any(self._columns.values()):
            self._flush()
        self._writer.close()


class PartWriter:
    """Writes the kept and the removed documents of a task into its folder. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._kept, self._removed = (
            _Table(folder / KEPT, _TEXT_COLUMNS),
            _Table(folder / REMOVED, _REMOVED_COLUMNS),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._kept.close()
        self._removed.close()

    @property
    def size(self) -> int:
        """Bytes that were written so far, before compression, about."""
        return self._kept.size + self._removed.size

    def keep(self, document: Document) -> None:
        """Write a document that goes on."""
        fields = {name: value for name, value in document.fields.items() if name != TOKENS}
        text = json.dumps(fields, sort_keys=True) if fields else ""
        tokens = np.asarray(document.fields.get(TOKENS, ()), "<u4").tobytes()
        self._kept.write((document.id, document.corpus, document.url, document.language, document.text, text, tokens))

    def remove(self, removed: Removed) -> None:
        """Write a document that ends here."""
        self._removed.write(
            (
                removed.id,
                removed.corpus,
                removed.url,
                removed.language,
                removed.stage,
                removed.reason,
                removed.detail,
                removed.excerpt,
            )
        )


def read_kept(folder: Path) -> Iterator[Document]:
    """Yield the kept documents of a task's folder, in order."""
    for row in _rows(folder / KEPT):
        fields, tokens = json.loads(row.pop("fields") or "{}"), row.pop("tokens")
        if tokens:
            fields[TOKENS] = np.frombuffer(tokens, "<u4")
        yield Document(**row, fields=fields)


def read_removed(folder: Path) -> Iterator[Removed]:
    """Yield the documents that a task has removed, in order."""
    for row in _rows(folder / REMOVED):
        yield Removed(**row)


def count_kept(folder: Path) -> int:
    """Return how many documents a task has kept."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(folder / KEPT).num_rows)


def read_column(folder: Path, name: str) -> Iterator[str]:
    """Yield a column of the kept documents, such as `text`, `url` or `id`, in order."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(folder / KEPT) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=[name]):
            yield from batch.column(0).to_pylist()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from _rows_of(batch)


def _rows_of(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [column.to_pylist() for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
