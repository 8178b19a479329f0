"""The records of manifest.json: which piece of which tensor is in which file, and the JSON state.

JSON only, no pickle.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from trimaran.models.parallel.shard import Box, ShardSpec, num_elements
from trimaran.runtime.checkpoint.boxes import global_boxes
from trimaran.runtime.files import parse_json, read_bytes
from trimaran.runtime.spec.errors import show

MANIFEST_NAME = "manifest.json"
FORMAT: Final = "trimaran-checkpoint"
FORMAT_VERSION: Final = 2
"""Version 1 listed every piece as a record of its own: Falcon-40B at 384 ranks had 138,000 of them in 60 MB."""

# 63 bits, so that sums of two such numbers fit into the integers of other tools.
Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]
Name = Annotated[str, Field(strict=True)]
Dims = Annotated[tuple[Count, ...], Field(max_length=64)]
Column = tuple[Count, ...]
Dtype = Literal["float32", "float64", "bfloat16"]
FileName = Annotated[str, Field(pattern=r"^rank-\d{5,}\.safetensors$")]
"""A bare name: a manifest from a stranger can't point to a file outside its own folder."""
_NOT_CUT = -1
_ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is incomplete; the message says which file or rank, why, and what to do."""


class Record(BaseModel):
    """A frozen JSON record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PieceRecord(Record):
    """One stored flat range of one rank's local shard: the fields of `ShardPiece`, with a file in place of data."""

    name: Name
    key: Name
    global_shape: Dims
    dim: Count | None
    offset: Count
    local_shape: Dims
    start: Count
    length: Annotated[int, Field(ge=1, lt=2**62, strict=True)]
    dtype: Dtype
    file: FileName

    @model_validator(mode="after")
    def _fits(self) -> "PieceRecord":
        self.spec.check(self.local_shape)
        if self.start + self.length > num_elements(self.local_shape):
            raise ValueError(
                f"range [{self.start}, {self.start + self.length}) does not fit in local_shape {self.local_shape}"
            )
        return self

    @property
    def spec(self) -> ShardSpec:
        """The cut as a ShardSpec. The mesh axis is not stored, because no reader depends on it."""
        return ShardSpec(
            axis=None if self.dim is None else "stored",
            dim=self.dim,
            global_shape=self.global_shape,
            offset=self.offset,
        )

    @property
    def tensor_key(self) -> str:
        """Name of the tensor inside the safetensors file."""
        return f"{self.key}|{self.name}|{self.start}"

    def boxes(self) -> list[Box]:
        """Boxes of the global tensor that this piece holds."""
        return global_boxes(self.spec, self.local_shape, self.start, self.start + self.length)


class FileRecord(Record):
    """One shard file: its bare name, size and digest."""

    file: FileName
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RankIndex(Record):
    """What one rank wrote; `file` is None for a rank that owns nothing."""

    file: FileRecord | None
    pieces: tuple[PieceRecord, ...]


class TensorRecord(Record):
    """One stored tensor. Its pieces are columns: entry i of each is that field of piece i.

    Args:
        file: index into the manifest's `files`.
        dim: cut dim, -1 for a piece of a tensor that is not cut.
        local_length: of the local shard along `dim`, 0 where it is not cut.
        offset, start, length: as in PieceRecord.
    """

    name: Name
    key: Name
    global_shape: Dims
    dtype: Dtype
    file: Column
    dim: tuple[Annotated[int, Field(ge=_NOT_CUT, lt=64, strict=True)], ...]
    offset: Column
    local_length: Column
    start: Column
    length: Column

    @model_validator(mode="after")
    def _fits(self) -> "TensorRecord":
        shape = self.global_shape
        # Elements for each index along a dim: a shard of n indexes has n times as many.
        slices = [num_elements((*shape[:dim], *shape[dim + 1 :])) for dim in range(len(shape))]
        columns = (self.dim, self.offset, self.local_length, self.start, self.length)
        if {len(self.file)} != set(map(len, columns)):
            raise ValueError(f"the columns of {self.key!r} of {self.name!r} differ in length")
        for dim, offset, local_length, start, length in zip(*columns, strict=True):
            if dim >= len(shape) or (dim == _NOT_CUT and (offset or local_length)):
                raise ValueError(
                    f"dim {dim}, offset {offset}, local_length {local_length} is no cut of global_shape {shape}"
                )
            elements = num_elements(shape) if dim == _NOT_CUT else slices[dim] * local_length
            if not 0 < length <= elements - start:
                raise ValueError(f"range [{start}, {start + length}) does not fit in a shard of {elements} elements")
        if sum(self.length) < num_elements(shape):
            raise ValueError(f"the pieces of {self.key!r} of {self.name!r} are less than its global_shape {shape}")
        return self

    def pieces(self, files: Sequence["FileRecord"]) -> list[PieceRecord]:
        """Return the pieces; `files` is that of the manifest."""
        pieces = []
        for index, dim in enumerate(self.dim):
            local_shape = list(self.global_shape)
            if dim != _NOT_CUT:
                local_shape[dim] = self.local_length[index]
            record = PieceRecord(
                name=self.name,
                key=self.key,
                global_shape=self.global_shape,
                dim=None if dim == _NOT_CUT else dim,
                offset=self.offset[index],
                local_shape=tuple(local_shape),
                start=self.start[index],
                length=self.length[index],
                dtype=self.dtype,
                file=files[self.file[index]].file,
            )
            pieces.append(record)
        return pieces


class Manifest(Record):
    """The whole manifest.

    `state` is the run's JSON (tokens_seen, consumed_samples, seed, lr state, layout, spec, ...).
    """

    format: Literal["trimaran-checkpoint"] = FORMAT
    version: Literal[2] = FORMAT_VERSION
    step: Count
    world_size: Count
    state: dict[str, Any]
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]

    @model_validator(mode="after")
    def _refers_to_what_it_lists(self) -> "Manifest":
        if any(max(tensor.file, default=-1) >= len(self.files) for tensor in self.tensors):
            raise ValueError(f"pieces lie in files that the manifest does not list; it lists {len(self.files)}")
        room = [record.size_bytes for record in self.files]
        for tensor in self.tensors:
            item_bytes = _ITEM_BYTES[tensor.dtype]
            for file, length in zip(tensor.file, tensor.length, strict=True):
                room[file] -= length * item_bytes
        if min(room, default=0) < 0:
            raise ValueError("the pieces of a file are larger than the file")
        names = [(tensor.name, tensor.key) for tensor in self.tensors]
        if len(set(names)) < len(names):
            raise ValueError("a tensor is listed twice")
        return self


def tensor_records(pieces: Iterable[PieceRecord], files: Sequence[FileRecord]) -> tuple[TensorRecord, ...]:
    """Return the pieces as records of whole tensors; `files` is that of the manifest.

    Raises:
        ValueError: a piece lies in none of the files, or pieces of one tensor differ in shape or dtype.
    """
    indexes = {record.file: index for index, record in enumerate(files)}
    tensors: dict[tuple[str, str], list[PieceRecord]] = defaultdict(list)
    for piece in pieces:
        if piece.file not in indexes:
            raise ValueError(f"pieces lie in files that the manifest does not list: {piece.file}")
        tensors[piece.name, piece.key].append(piece)
    records = []
    for (name, key), group in tensors.items():
        if len({(piece.global_shape, piece.dtype) for piece in group}) > 1:
            raise ValueError(f"pieces of {key!r} of {name!r} differ in shape or dtype")
        record = TensorRecord(
            name=name,
            key=key,
            global_shape=group[0].global_shape,
            dtype=group[0].dtype,
            file=tuple(indexes[piece.file] for piece in group),
            dim=tuple(_NOT_CUT if piece.dim is None else piece.dim for piece in group),
            offset=tuple(piece.offset for piece in group),
            local_length=tuple(0 if piece.dim is None else piece.local_shape[piece.dim] for piece in group),
            start=tuple(piece.start for piece in group),
            length=tuple(piece.length for piece in group),
        )
        records.append(record)
    return tuple(records)


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text that contains its own sha256.

    Raises:
        ValueError, TypeError: `state` holds something JSON cannot (NaN, infinity, an object).
    """
    body = manifest.model_dump(mode="python")
    return json.dumps({**body, "manifest_sha256": _digest(body)}, separators=(",", ":"), allow_nan=False)


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``, also one of format version 1.

    Raises:
        CheckpointError: it is missing, not JSON, of another format version, changed since it was written, or
            inconsistent.
    """
    path = folder / MANIFEST_NAME
    try:
        body = parse_json(read_bytes(path), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # both JSON and UTF-8 errors
        raise CheckpointError(f"{path} is not JSON ({error}): the file is damaged") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {FORMAT!r}")
    version = body.get("version")
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {show(version)}, this trimaran reads versions 1 to "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    try:
        if body.pop("manifest_sha256", None) != _digest(body):
            raise CheckpointError(f"{path} does not match its own sha256: the file was changed or damaged")
        return _from_version_1(body) if version == 1 else Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error
    except ValueError as error:  # infinite numbers, surrogates, what contradicts itself
        raise CheckpointError(f"{path} is not a valid manifest: {error}") from error


def _from_version_1(body: dict[str, Any]) -> Manifest:
    index = RankIndex.model_validate({"file": None, "pieces": body.pop("pieces", None)})
    files = TypeAdapter(tuple[FileRecord, ...]).validate_python(body.get("files"))
    return Manifest.model_validate({**body, "version": 2, "tensors": tensor_records(index.pieces, files)})


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


def _digest(body: dict[str, Any]) -> str:
    """sha256 of the canonical JSON text of `body`, so that layout and key order of the file do not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
