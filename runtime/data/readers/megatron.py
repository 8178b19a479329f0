"""Documents of Megatron's .bin and .idx, which are token ids already: `document.fields["tokens"]`, and no text.

The format is version 1 of megatron-core's `IndexedDataset`: the .idx has a mark, the version, a code of the dtype, the
number of sequences and that of documents + 1, then of every sequence its length (int32) and first byte in the .bin
(int64), and of every document its first sequence (int64). A part is a range of documents.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally
from trimaran.runtime.data.readers.streams import open_raw
from trimaran.runtime.files import open_regular

MARK: Final = b"MMIDIDX\0\0"
HEAD: Final = struct.Struct("<9sQBQQ")
DTYPES: Final = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, slots=True)
class _Index:
    """What the head of an .idx says; `read_*` read a range of one of its arrays."""

    file: BinaryIO
    dtype: np.dtype[np.integer]
    sequences: int
    documents: int

    @classmethod
    def open(cls, file: BinaryIO) -> "_Index":
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size or not head.startswith(MARK):
            raise Damage("read.damaged", "its .idx does not begin as one of Megatron's IndexedDataset does", 0)
        _, version, code, sequences, ends = HEAD.unpack(head)
        if version != 1 or code not in DTYPES or not ends:
            raise Damage("read.damaged", f"its .idx has version {version} and dtype code {code}, not token ids", 0)
        needed = HEAD.size + 12 * sequences + 8 * ends
        if size < needed:
            raise Damage("read.truncated", f"its .idx has {size:,} of {needed:,} bytes", 0)
        return cls(file, np.dtype(DTYPES[code]), sequences, ends - 1)

    def _read(self, offset: int, dtype: str, start: int, stop: int) -> npt.NDArray[np.int64]:
        width = np.dtype(dtype).itemsize
        self.file.seek(HEAD.size + offset + width * start)
        return np.frombuffer(self.file.read(width * (stop - start)), dtype).astype(np.int64)

    def read_lengths(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._read(0, "<i4", start, stop)

    def read_pointers(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._read(4 * self.sequences, "<i8", start, stop)

    def read_documents(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._read(12 * self.sequences, "<i8", start, stop)


def index_file(file: str) -> str:
    """Return the .idx beside a .bin."""
    return file.removesuffix(".bin") + ".idx"


def _open_index(part: Part) -> io.BufferedReader:
    return open_raw(replace(part, file=index_file(part.file), stamp=""))


def document_ends(path: Path, width: int) -> npt.NDArray[np.int64] | None:
    """Return where the documents of a local .bin that have tokens end, in tokens: [documents], ascending.

    None where its tokens do not have `width` bytes, or documents do not follow each other directly.
    """
    with open_regular(Path(index_file(str(path)))) as file:
        index = _Index.open(file)
        lengths, pointers = index.read_lengths(0, index.sequences), index.read_pointers(0, index.sequences)
        ends = index.read_documents(0, index.documents + 1)
    after = np.concatenate(([0], np.cumsum(lengths)))
    if (
        index.dtype.itemsize != width
        or not np.array_equal(pointers, after[:-1] * width)
        or ends[0]
        or ends[-1] != len(lengths)
    ):
        return None
    return np.unique(after[ends])[1:]


def split_megatron(part: Part, settings: ReadSettings, part_bytes: int) -> list[tuple[int, int, int]]:
    """Return (first document, end, bytes) of parts of about `part_bytes`, if documents are of about one length."""
    with _open_index(part) as file:
        documents = _Index.open(file).documents
    pieces = max(1, min(documents, part.file_bytes // part_bytes))
    ends = [documents * piece // pieces for piece in range(pieces + 1)]
    return [(start, stop, part.file_bytes // pieces) for start, stop in pairwise(ends)]


def read_megatron(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the token ids of the part's documents."""
    with _open_index(part) as index_of, open_raw(part) as file:
        index = _Index.open(index_of)
        start, stop = part.start, index.documents if part.stop is None else part.stop
        ends = index.read_documents(start, stop + 1)
        first, last = int(ends[0]), int(ends[-1])
        if np.any(np.diff(ends) < 0) or first < 0 or last > index.sequences:
            raise Damage("read.damaged", "its .idx has documents that are out of order", start)
        lengths, pointers = index.read_lengths(first, last), index.read_pointers(first, last)
        size, width = file.seek(0, os.SEEK_END), index.dtype.itemsize
        if np.any(lengths < 0) or np.any(pointers < 0) or np.any(np.diff(pointers) < 0):
            raise Damage("read.damaged", "its .idx has sequences that are out of order", start)
        for number in range(start, stop):
            place = part.place(number)
            here = slice(*(int(end) - first for end in ends[number - start : number - start + 2]))
            total = int(lengths[here].sum()) * width
            if total > settings.max_document_bytes:
                yield Loss(place, "read.too_large", f"{total:,} bytes of token ids")
                continue
            pieces = []
            for pointer, length in zip(pointers[here].tolist(), lengths[here].tolist(), strict=True):
                if pointer + length * width > size:
                    detail = f"the .bin has {size:,} bytes, and the .idx says more"
                    yield Loss(place, "read.truncated", detail, stop - number)
                    return
                file.seek(pointer)
                pieces.append(np.frombuffer(file.read(length * width), index.dtype))
            tokens = np.concatenate(pieces) if pieces else np.empty(0, index.dtype)
            if not tokens.size:
                yield Loss(place, "read.empty")
            elif index.dtype.kind == "i" and tokens.min() < 0:
                yield Loss(place, "read.damaged", f"the token id {tokens.min()}")
            else:
                yield Document(place, corpus=part.corpus, fields={"tokens": tokens})
