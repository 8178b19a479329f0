"""Token shards: flat little-endian .bin files, written once, then memory mapped. No torch."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.files import READ_BYTES, DataError, once_per_change, unreadable
from trimaran.runtime.files import check_regular, open_regular, parse_json, read_bytes

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
# 512 MiB of uint16: big enough that a window rarely spans two files, small enough to copy and check one at a time.
TOKENS_PER_SHARD = 1 << 28
# Of each file that is compared between ranks.
_PIECES, _PIECE_BYTES = 64, 4096
DTYPES: dict[str, np.dtype[np.unsignedinteger[Any]]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The manifest's record of one file; `corpus` is "" where there is only one."""

    file: str
    tokens: int
    bytes: int
    sha256: str
    corpus: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """The record as JSON."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def dtype_for(vocab_size: int) -> str:
    """Return the narrowest token dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Appends tokens of one split to numbered files in a folder; `close` returns their records.

    A context manager, so that an error leaves no file open.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, tokens_per_shard: int = TOKENS_PER_SHARD, corpus: str = ""
    ) -> None:
        self._folder, self._corpus = folder, corpus
        self._split = f"{split}-{corpus}" if corpus else split
        self._dtype = DTYPES[dtype]
        self._tokens_per_shard = tokens_per_shard
        self._done: list[ShardInfo] = []
        self._begin_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _begin_shard(self) -> None:
        self._name = f"{self._split}-{len(self._done):05d}.bin"
        self._file = (self._folder / self._name).open("wb")
        self._digest = hashlib.sha256()
        self._tokens = 0

    def _end_shard(self) -> None:
        self._file.close()
        if self._tokens:
            self._done.append(
                ShardInfo(
                    self._name,
                    self._tokens,
                    self._tokens * self._dtype.itemsize,
                    self._digest.hexdigest(),
                    self._corpus,
                )
            )
        else:
            # An empty file can't be memory mapped; an empty split has no files.
            (self._folder / self._name).unlink()

    def write(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append token ids, starting a new file where the current one is full.

        OverflowError for an id that the dtype can't hold.
        """
        remaining = np.asarray(tokens, dtype=self._dtype)
        while len(remaining):
            if self._tokens == self._tokens_per_shard:
                self._end_shard()
                self._begin_shard()
            part = remaining[: self._tokens_per_shard - self._tokens]
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._tokens += len(part)
            remaining = remaining[len(part) :]

    def append(self, path: Path) -> None:
        """Append the tokens of a file of the same dtype."""
        with open_regular(path) as file:
            while block := file.read(READ_BYTES):
                self.write(np.frombuffer(block, self._dtype))

    def close(self) -> list[ShardInfo]:
        """Finish the last file and return the records of all files in order."""
        self._end_shard()
        return self._done


class TokenShards:
    """The tokens of one split as one long sequence, read from memory-mapped files."""

    def __init__(self, folder: Path, split: str, dtype: str, shards: Sequence[ShardInfo]) -> None:
        """Map the files; DataError when one is missing or its size differs from the manifest."""
        self.folder, self.split = folder, split
        self.dtype = DTYPES[dtype]
        self.shards = tuple(shards)
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._maps = [self._map(shard) for shard in shards]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the split."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def of_corpora(self) -> "dict[str, TokenShards]":
        """Return the tokens of each corpus by its name, in order; one named "" where there are no corpora."""
        names = dict.fromkeys(shard.corpus for shard in self.shards)
        dtype = next(name for name, each in DTYPES.items() if each == self.dtype)
        return {
            name: TokenShards(self.folder, self.split, dtype, [each for each in self.shards if each.corpus == name])
            for name in names
        }

    def _map(self, shard: ShardInfo) -> TokenArray:
        path = self.folder / shard.file
        try:
            size = check_regular(path).stat().st_size
            if size != shard.bytes or size != shard.tokens * self.dtype.itemsize:
                raise DataError(
                    f"token shard {path} has {size} bytes where its manifest says {shard.bytes}; {_remedy(self.folder)}"
                )
            return np.memmap(check_regular(path), dtype=self.dtype, mode="r")
        except OSError as error:
            raise DataError(f"{unreadable(path, error)}; {_remedy(self.folder)}") from error

    def read(self, start: int, count: int) -> TokenArray:
        """Return tokens [start, start + count): [count] of the shard's dtype, a view where one file holds them all.

        Raises IndexError outside [0, num_tokens].
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of split {self.split} that has {self.num_tokens}")
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0:
            offset = start - (int(self._ends[index - 1]) if index else 0)
            part = self._maps[index][offset : offset + count]
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)


def verify_shards(folder: Path, splits: Sequence[TokenShards], vocab_size: int) -> None:
    """Raise DataError where a file's sha256 differs from the manifest or a token is beyond the vocabulary.

    Files are read in parallel, and only those that have changed since they were last verified; checked.json has that.
    """
    shards = [(split, shard) for split in splits for shard in split.shards]
    paths = [folder / shard.file for _, shard in shards]
    dtypes = {path: split.dtype for path, (split, _) in zip(paths, shards, strict=True)}

    def examine(path: Path) -> str:
        return " ".join(map(str, _sha256_and_largest(path, dtypes[path])))

    for path, (_, shard), found in zip(
        paths, shards, once_per_change(paths, folder / "checked.json", examine), strict=True
    ):
        sha256, largest = found.split()
        if sha256 != shard.sha256:
            difference = f"has sha256 {sha256[:16]}... where its manifest says {shard.sha256[:16]}..."
            raise DataError(f"token shard {path} {difference}; {_remedy(folder)}")
        if int(largest) >= vocab_size:
            raise DataError(
                f"token shard {path} has the token {largest}, and its tokenizer only {vocab_size}; {_remedy(folder)}"
            )


def _sha256_and_largest(path: Path, dtype: np.dtype[np.unsignedinteger[Any]]) -> tuple[str, int]:
    digest, largest = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, dtype).max()))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest(), largest


def _remedy(folder: Path) -> str:
    return f"delete the folder {folder} and the data is prepared again"


def mapped_digest(folder: Path) -> str:
    """Return a digest of the manifest in `folder` and of pieces of every shard: what a rank there would map.

    Pieces are spread evenly over each file, so that other shards under the same manifest have another digest, at the
    cost of a few reads. Raises OSError or ValueError where one can't be read.
    """
    content = read_bytes(folder / "manifest.json")
    digest = hashlib.sha256(content)
    for split in parse_json(content)["splits"].values():
        for shard in split["shards"]:
            with open_regular(folder / shard["file"]) as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(b"%d" % size)
                for piece in range(_PIECES):
                    file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
                    digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
