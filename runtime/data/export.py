"""Writes what was kept for other programs: documents as .jsonl.zst or .parquet, tokens as Megatron's .bin and .idx.

Each file is written whole or not at all, and the same documents give the same bytes.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.document import Document
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import hash_file
from trimaran.runtime.data.readers.megatron import DTYPES, HEAD, MARK, index_file
from trimaran.runtime.data.tokens.shards import TokenShards

FORMATS: Final = ("megatron", "jsonl.zst", "parquet")
FILE_BYTES: Final = 1 << 30
_ROW_GROUP_BYTES: Final = 32 << 20
_LEVEL: Final = 3
# megatron-core takes uint16 below this size of a vocabulary (`DType.optimal_dtype`).
_UINT16_VOCABULARY: Final = 65500
_COLUMNS: Final = ("id", "text", "url", "corpus", "language")
_READ_TOKENS: Final = 1 << 20

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that was written; `documents` begin in it."""

    path: Path
    documents: int
    bytes: int
    sha256: str


class _Writer(Protocol):
    """Writes documents to a file."""

    def write(self, document: Document) -> None:
        """Append a document."""

    def close(self) -> None:
        """Write what ends the file."""


class _JsonLines:
    def __init__(self, file: BinaryIO) -> None:
        require_extra("zstandard")
        import zstandard

        self._stream: Any = zstandard.ZstdCompressor(level=_LEVEL).stream_writer(file, closefd=False)

    def write(self, document: Document) -> None:
        row = {name: getattr(document, name) for name in _COLUMNS} | {"fields": document.fields}
        self._stream.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    """The columns of a document; `fields`, whose names differ from document to document, is JSON."""

    def __init__(self, file: BinaryIO) -> None:
        require_extra("pyarrow")
        import pyarrow
        import pyarrow.parquet

        self._schema = pyarrow.schema([(name, pyarrow.string()) for name in (*_COLUMNS, "fields")])
        self._table = pyarrow.Table
        self._file = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[dict[str, str]] = []
        self._size = 0

    def write(self, document: Document) -> None:
        fields = json.dumps(document.fields, ensure_ascii=False, default=str)
        self._rows.append({name: getattr(document, name) for name in _COLUMNS} | {"fields": fields})
        self._size += len(document.text)
        if self._size >= _ROW_GROUP_BYTES:
            self._write_rows()

    def _write_rows(self) -> None:
        self._file.write_table(self._table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0

    def close(self) -> None:
        try:
            if self._rows:
                self._write_rows()
            self._file.close()
        finally:
            self._file.is_open = False  # or it would write once more when it is collected


_WRITERS: Final[dict[str, Callable[[BinaryIO], _Writer]]] = {"jsonl.zst": _JsonLines, "parquet": _Parquet}


def export_documents(
    documents: Iterable[Document], folder: Path, format: str, name: str = "documents", file_bytes: int = FILE_BYTES
) -> list[ExportedFile]:
    """Write documents to folder/NAME-00000.FORMAT and so on; return the files in order.

    Args:
        format: jsonl.zst or parquet.
        file_bytes: about the bytes of text of a file.

    Raises:
        OSError: a file can't be written; it names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[ExportedFile] = []
    source = iter(documents)
    document = next(source, None)
    while document is not None or not found:  # of no documents too, one file says so
        path, count, size = folder / f"{name}-{len(found):05d}.{format}", 0, 0
        with _whole(path) as file, closing(_WRITERS[format](file)) as writer:
            while document is not None and (not count or size < file_bytes):
                writer.write(document)
                count, size = count + 1, size + len(document.text.encode())
                document = next(source, None)
        found.append(ExportedFile(path, count, path.stat().st_size, hash_file(path)))
    return found


def export_megatron(documents: Iterable[Tokens], prefix: Path, vocab_size: int) -> list[ExportedFile]:
    """Write documents of token ids to PREFIX.bin and PREFIX.idx, as megatron-core's IndexedDatasetBuilder does.

    Args:
        vocab_size: below 65,500 the ids take two bytes, otherwise four.

    Raises:
        OverflowError: a token id is beyond the vocabulary, or a document longer than the .idx can say.
        OSError: a file can't be written; it names the file.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    code = 8 if vocab_size < _UINT16_VOCABULARY else 4
    dtype, lengths = np.dtype(DTYPES[code]), array("i")
    tokens_file = prefix.with_name(f"{prefix.name}.bin")
    with _whole(tokens_file) as file:
        for tokens in documents:
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                raise OverflowError(
                    f"document {len(lengths)} has token ids from {tokens.min()} to {tokens.max()}, and the vocabulary "
                    f"{vocab_size}"
                )
            file.write(np.ascontiguousarray(tokens, dtype).tobytes())
            lengths.append(len(tokens))
    counts = np.frombuffer(lengths, np.int32) if lengths else np.empty(0, np.int32)
    starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64) * dtype.itemsize))[:-1]
    index = Path(index_file(str(tokens_file)))
    with _whole(index) as file:
        file.write(HEAD.pack(MARK, 1, code, len(counts), len(counts) + 1))
        for values in (counts.astype("<i4"), starts.astype("<i8"), np.arange(len(counts) + 1, dtype="<i8")):
            file.write(values.tobytes())
    return [ExportedFile(path, len(counts), path.stat().st_size, hash_file(path)) for path in (tokens_file, index)]


def documents_of_shards(shards: TokenShards, end_of_text: int) -> Iterator[Tokens]:
    """Yield the documents of a split's shards: the tokens up to, and with, each that ends a document.

    The last one has no such token where the shards end within a document.
    """
    pieces: list[Tokens] = []
    for start in range(0, shards.num_tokens, _READ_TOKENS):
        tokens = shards.read(start, min(_READ_TOKENS, shards.num_tokens - start))
        begin = 0
        for end in np.flatnonzero(tokens == end_of_text) + 1:
            yield np.concatenate([*pieces, tokens[begin:end]])
            pieces, begin = [], int(end)
        pieces.append(tokens[begin:])
    if sum(map(len, pieces)):
        yield np.concatenate(pieces)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, named `path` when the block ends and removed when it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # the disk is full
            error.filename = str(path)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
