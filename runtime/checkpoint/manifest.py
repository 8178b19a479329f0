"""The records of manifest.json: which piece of which tensor is in which file, and the JSON state.

JSON only, no pickle.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimaran.models.parallel.shard import Box, ShardSpec, num_elements
from trimaran.runtime.checkpoint.boxes import global_boxes

MANIFEST_NAME = "manifest.json"
FORMAT = "trimaran-checkpoint"
FORMAT_VERSION = 1

Count = Annotated[int, Field(ge=0, strict=True)]
FileName = Annotated[str, Field(pattern=r"^rank-\d{5,}\.safetensors$")]
"""A bare name: a manifest from a stranger can't point to a file outside its own folder."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is incomplete; the message says which file or rank, why, and what to do."""


class Record(BaseModel):
    """A frozen JSON record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PieceRecord(Record):
    """One stored flat range of one rank's local shard: the fields of `ShardPiece`, with a file in place of data."""

    name: str
    key: str
    global_shape: tuple[Count, ...]
    dim: Count | None
    offset: Count
    local_shape: tuple[Count, ...]
    start: Count
    length: Annotated[int, Field(ge=1, strict=True)]
    dtype: Literal["float32", "float64", "bfloat16"]
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


class Manifest(Record):
    """The whole manifest.

    `state` is the run's JSON (tokens_seen, consumed_samples, seed, lr state, layout, spec, ...).
    """

    format: Literal["trimaran-checkpoint"] = "trimaran-checkpoint"
    version: Literal[1] = 1
    step: Count
    world_size: Count
    state: dict[str, Any]
    files: tuple[FileRecord, ...]
    pieces: tuple[PieceRecord, ...]

    @model_validator(mode="after")
    def _every_piece_has_its_file(self) -> "Manifest":
        known = {record.file for record in self.files}
        unknown = sorted({piece.file for piece in self.pieces} - known)
        if unknown:
            raise ValueError(f"pieces lie in files that the manifest does not list: {unknown}")
        return self


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text that contains its own sha256.

    Raises:
        ValueError, TypeError: `state` holds something JSON cannot (NaN, infinity, an object).
    """
    body = manifest.model_dump(mode="python")
    return json.dumps({**body, "manifest_sha256": _digest(body)}, indent=1, allow_nan=False)


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``.

    Raises:
        CheckpointError: it is missing, not JSON, of another format version, changed since it was written, or
            inconsistent.
    """
    path = folder / MANIFEST_NAME
    try:
        body = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # both JSON and UTF-8 errors
        raise CheckpointError(f"{path} is not JSON ({error}): the file is damaged") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of format {FORMAT!r}")
    if body.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body.get('version')!r}, this trimaran reads version "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    if body.pop("manifest_sha256", None) != _digest(body):
        raise CheckpointError(f"{path} does not match its own sha256: the file was changed or damaged")
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


def _digest(body: dict[str, Any]) -> str:
    """sha256 of the canonical JSON text of `body`, so that layout and key order of the file do not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
