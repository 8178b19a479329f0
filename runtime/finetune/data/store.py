"""Prepared examples on disk: flat files of one split, written once, then memory mapped. No torch."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.files import DataError, hash_file, unreadable
from trimaran.runtime.data.tokens.shards import DTYPES
from trimaran.runtime.files import check_regular
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.records import Origin

_REMEDY: Final = "delete the folder and the examples are prepared again"
# Arrays of a split beside its tokens, by name. An array of ends has the end of each thing in the next array.
_DTYPES: Final[Mapping[str, str]] = {
    "learned": "|u1",  # [tokens]
    "document_ends": "<i8",  # [documents], in tokens
    "example_ends": "<i8",  # [examples], in documents
    "values": "<f8",  # [examples]
    "origins": "<i8",  # [examples * 2]: number of the file, line
    "fields": "|u1",  # UTF-8
    "fields_ends": "<i8",  # [examples], in bytes of fields
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The manifest's record of one file."""

    file: str
    bytes: int
    sha256: str


def write_split(
    folder: Path, split: str, dtype: str, examples: Iterable[Example], files: Mapping[str, int]
) -> dict[str, Any]:
    """Write the files of a split into `folder`; return the manifest's record of it.

    Args:
        dtype: of the tokens, a key of DTYPES.
        files: number of each file that examples come from.
    """
    digests = {name: hashlib.sha256() for name in ("tokens", *_DTYPES)}
    sizes = dict.fromkeys(digests, 0)
    totals = {"examples": 0, "documents": 0, "tokens": 0, "learned": 0}
    opened = {name: (folder / f"{split}-{name}.bin").open("wb") for name in digests}

    def write(name: str, values: Any) -> None:
        content = np.asarray(values, dtype=DTYPES[dtype] if name == "tokens" else np.dtype(_DTYPES[name])).tobytes()
        opened[name].write(content)
        digests[name].update(content)
        sizes[name] += len(content)

    try:
        for example in examples:
            for document in example.documents:
                write("tokens", document.tokens)
                write("learned", document.learned)
                totals["tokens"] += len(document.tokens)
                totals["learned"] += document.num_learned
                write("document_ends", [totals["tokens"]])
            totals["documents"] += len(example.documents)
            totals["examples"] += 1
            write("example_ends", [totals["documents"]])
            write("values", [example.value])
            write("origins", [files[example.origin.file], example.origin.line])
            write("fields", np.frombuffer(example.fields.encode(), np.uint8))
            write("fields_ends", [sizes["fields"]])
    finally:
        for file in opened.values():
            file.close()
    infos = [FileInfo(f"{split}-{name}.bin", sizes[name], digests[name].hexdigest()) for name in digests]
    # "shards" as for a corpus: their hashes identify the data of a run.
    return {**totals, "shards": [asdict(info) for info in infos]}


class ExampleSet:
    """The examples of one split, read from memory-mapped files.

    Attributes:
        num_examples: of the split.
        num_documents: of the split.
        example_lengths: [examples] int64, tokens of each.
        num_learned: [examples] int64, learned tokens of each.
        document_lengths: [documents] int64, tokens of each.
        document_learned: [documents] int64, learned tokens of each.
        values: [examples] float64; see `Example`.
    """

    def __init__(self, folder: Path, split: str, record: Mapping[str, Any], dtype: str, files: Sequence[str]) -> None:
        """Map the files; DataError when one is missing or its size differs from the manifest."""
        self.folder, self.split, self.record = folder, split, record
        self._files = tuple(files)
        self._infos = [FileInfo(**each) for each in record["shards"]]
        arrays = {}
        for info, (name, kind) in zip(self._infos, {"tokens": DTYPES[dtype].str, **_DTYPES}.items(), strict=True):
            arrays[name] = _map(folder, info, np.dtype(kind))
        self._tokens, self._learned = arrays["tokens"], arrays["learned"]
        self._document_ends, self._example_ends = arrays["document_ends"], arrays["example_ends"]
        self._fields, self._fields_ends = arrays["fields"], arrays["fields_ends"]
        self._origins = arrays["origins"].reshape(-1, 2)
        self.values: npt.NDArray[np.float64] = arrays["values"]
        self.num_examples, self.num_documents = len(self._example_ends), len(self._document_ends)
        ends = self._document_ends[self._example_ends - 1] if self.num_examples else np.empty(0, np.int64)
        starts = np.concatenate([[0], ends])
        self.example_lengths: npt.NDArray[np.int64] = np.diff(starts)
        self.num_learned: npt.NDArray[np.int64] = self._learned_between(starts)
        bounds = np.concatenate([np.zeros(1, np.int64), self._document_ends])
        self.document_lengths: npt.NDArray[np.int64] = np.diff(bounds)
        self.document_learned: npt.NDArray[np.int64] = self._learned_between(bounds)

    def _learned_between(self, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many tokens are learned between consecutive bounds, which have a token between them each."""
        # A range that is empty would count the token at its place.
        if len(bounds) < 2:
            return np.empty(0, np.int64)
        counts: npt.NDArray[np.int64] = np.add.reduceat(self._learned, bounds[:-1], dtype=np.int64)
        return counts

    def documents_of(self, example: int) -> range:
        """Return the numbers of an example's documents in the split."""
        return range(int(self._example_ends[example - 1]) if example else 0, int(self._example_ends[example]))

    def document(self, number: int) -> Document:
        """Return a document by its number in the split."""
        span = slice(int(self._document_ends[number - 1]) if number else 0, int(self._document_ends[number]))
        return Document(self._tokens[span].astype(np.int64), self._learned[span].astype(np.bool_))

    def example(self, number: int) -> Example:
        """Return an example by its number in the split."""
        documents = tuple(map(self.document, self.documents_of(number)))
        return Example(documents, self.origin(number), float(self.values[number]), self.fields(number))

    def origin(self, example: int) -> Origin:
        """Return where an example's record stands."""
        file, line = self._origins[example].tolist()
        return Origin(self._files[file], line)

    def fields(self, example: int) -> str:
        """Return the JSON text of the record's other fields, "" where none are kept."""
        span = slice(int(self._fields_ends[example - 1]) if example else 0, int(self._fields_ends[example]))
        return self._fields[span].tobytes().decode()

    def __iter__(self) -> Iterator[Example]:
        return map(self.example, range(self.num_examples))

    def verify(self) -> None:
        """Raise DataError where a file's content differs from the manifest."""
        for info in self._infos:
            if hash_file(self.folder / info.file) != info.sha256:
                raise DataError(f"{self.folder / info.file} differs from its manifest; {_REMEDY}")


def _map(folder: Path, info: FileInfo, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    path = folder / info.file
    try:
        size = check_regular(path).stat().st_size
        if size != info.bytes or size % dtype.itemsize:
            raise DataError(f"{path} has {size} bytes where its manifest says {info.bytes}; {_REMEDY}")
        # An empty file can't be memory mapped.
        return np.memmap(check_regular(path), dtype=dtype, mode="r") if size else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{unreadable(path, error, _REMEDY)}") from error
