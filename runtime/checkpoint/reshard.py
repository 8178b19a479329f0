"""Reading a checkpoint at any layout: a local shard, or a flat range of it, assembled from the stored pieces."""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimaran.models.parallel.shard import Box, Shape, ShardSpec, num_elements, whole
from trimaran.runtime.checkpoint.boxes import global_boxes, intersect, local_start, missing_ranges, strides, volume
from trimaran.runtime.checkpoint.files import DTYPE_NAMES, sha256_of
from trimaran.runtime.checkpoint.folder import check_sizes, check_step, step_of, what_to_do
from trimaran.runtime.checkpoint.manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    PieceRecord,
    TensorRecord,
    load_manifest,
)
from trimaran.runtime.files import check_regular

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Checkpoint:
    """An open checkpoint. Files are memory mapped one by one when needed, and only the requested pages are read.

    Open it with `Checkpoint.open`. A read is not collective: each rank reads what its own layout needs.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._tensors = {(tensor.name, tensor.key): tensor for tensor in manifest.tensors}
        self._open_files: dict[str, Any] = {}

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "Checkpoint":
        """Open the checkpoint folder `path`, as `latest` or `save` returned it.

        Args:
            path: the ``step-XXXXXXXX`` folder.
            verify: also compare the sha256 of every file. A run of many ranks passes False and divides the work:
                ``checkpoint.verify_files(checkpoint.files[rank::world_size])``. Manifest and file sizes are always
                checked.

        Raises:
            CheckpointError: it is not complete; names the file, the step and the older checkpoint to use instead.
        """
        path = Path(path)
        step = step_of(path)
        try:
            manifest = load_manifest(path)
            if step is not None:
                check_step(path, step, manifest)
            check_sizes(path, manifest.files)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path.name} cannot be used: {error}; {what_to_do(path)}") from error
        checkpoint = cls(path, manifest)
        if verify:
            checkpoint.verify_files(checkpoint.files)
        return checkpoint

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        return self._manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state saved with the checkpoint."""
        return self._manifest.state

    @property
    def world_size(self) -> int:
        """Number of ranks that saved the checkpoint."""
        return self._manifest.world_size

    @property
    def files(self) -> list[str]:
        """Names of the shard files, in rank order."""
        return [record.file for record in self._manifest.files]

    @property
    def digest(self) -> str:
        """sha256 of the digests of the files: equal where two checkpoints hold the same, wherever they are."""
        return hashlib.sha256(" ".join(sorted(record.sha256 for record in self._manifest.files)).encode()).hexdigest()

    def names(self) -> list[str]:
        """Names of the stored parameters, sorted."""
        return sorted({name for name, _ in self._tensors})

    def keys(self, name: str) -> list[str]:
        """State keys stored for parameter `name`, sorted; empty where there are none."""
        return sorted(key for stored, key in self._tensors if stored == name)

    def global_shape(self, name: str, key: str) -> Shape:
        """Global shape of a stored tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._find(name, key).global_shape

    def verify_files(self, files: Iterable[str]) -> None:
        """Compare size and sha256 of the named shard files with the manifest, reading each file once.

        Raises:
            CheckpointError: one is missing, truncated or has changed; names it, the step and the older checkpoint to
                use instead.
        """
        records = {record.file: record for record in self._manifest.files}
        for file in files:
            if file not in records:
                raise CheckpointError(f"{file} is not a shard file of {self.path.name}; those are {', '.join(records)}")
            self._verify(records[file])

    def read(
        self, name: str, key: str, spec: ShardSpec, local_shape: Shape, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The local shard that `spec` cuts out of a stored tensor, whatever layout wrote it. Padded rows are zero.

        Args:
            name: parameter name.
            key: "weight", "exp_avg" or "exp_avg_sq".
            spec: the cut of the reader; its global_shape must be the stored one.
            local_shape: the reader's local shape, padding included.
            dtype: of the result; None for the stored one.

        Returns:
            [*local_shape], contiguous, on the CPU.

        Raises:
            CheckpointError: no such tensor, another global shape, or stored pieces that do not cover the shard.
            ValueError: `local_shape` does not fit `spec`.
        """
        flat = self.read_range(name, key, spec, local_shape, 0, num_elements(local_shape), dtype=dtype)
        return flat.view(local_shape)

    def read_range(
        self,
        name: str,
        key: str,
        spec: ShardSpec,
        local_shape: Shape,
        start: int,
        stop: int,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Elements [start, stop) of the row-major local shard, such as a ZeRO shard; only that range is read.

        Args and errors as for `read`; returns [stop - start].
        """
        tensor = self._find(name, key)
        spec.check(local_shape)
        if not 0 <= start <= stop <= num_elements(local_shape):
            raise ValueError(f"range [{start}, {stop}) does not fit in local_shape {tuple(local_shape)}")
        if tuple(spec.global_shape) != tensor.global_shape:
            raise CheckpointError(
                f"{name!r} has global shape {tensor.global_shape} in {self.path.name} but {tuple(spec.global_shape)} "
                "in this run: the model section of the spec must be the one the checkpoint was trained with"
            )
        pieces = tensor.pieces(self._manifest.files)
        result = torch.zeros(stop - start, dtype=dtype or _DTYPES[tensor.dtype])
        wanted = global_boxes(spec, local_shape, start, stop)
        lacking = sum(volume(box) for box in wanted)
        for piece in pieces:
            lacking -= self._copy_piece(piece, wanted, result, spec, local_shape, start)
        if lacking:
            self._refuse_holes(name, key, spec, local_shape, start, stop, pieces)
        return result

    def read_global(self, name: str, key: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, [*global_shape]; the only read whose memory grows with the global size.

        Errors as for `read`.
        """
        shape = self.global_shape(name, key)
        return self.read(name, key, whole(shape), shape, dtype=dtype)

    def close(self) -> None:
        """Unmap the files; reading again maps them again."""
        self._open_files.clear()

    def _find(self, name: str, key: str) -> TensorRecord:
        tensor = self._tensors.get((name, key))
        if tensor is not None:
            return tensor
        near = difflib.get_close_matches(name, self.names(), n=1)
        known = (
            f"it has {self.keys(name)} of it"
            if self.keys(name)
            else f"the nearest name it has is {near[0] if near else None!r}"
        )
        raise CheckpointError(f"{self.path.name} has no {key!r} of {name!r}; {known}")

    def _copy_piece(
        self, piece: PieceRecord, wanted: Sequence[Box], result: Tensor, spec: ShardSpec, local_shape: Shape, start: int
    ) -> int:
        """Copy the elements of `piece` in the `wanted` global boxes into `result`; return how many were copied."""
        stored_spec, copied = piece.spec, 0
        shared_boxes = [
            shared for held in piece.boxes() for box in wanted if (shared := intersect(held, box)) is not None
        ]
        if not shared_boxes:
            return 0
        data = self._data(piece)
        for box in shared_boxes:
            shape = tuple(high - low for low, high in box)
            source = data[local_start(box, stored_spec, piece.local_shape) - piece.start :].as_strided(
                shape, strides(piece.local_shape)
            )
            target = result[local_start(box, spec, local_shape) - start :].as_strided(shape, strides(local_shape))
            target.copy_(source)
            copied += volume(box)
        return copied

    def _data(self, piece: PieceRecord) -> Tensor:
        """The stored flat range as a view of the mapped file, so that the caller's copy is the only one."""
        try:
            if piece.file not in self._open_files:
                self._open_files[piece.file] = safe_open(
                    check_regular(self.path / piece.file), framework="pt", device="cpu"
                )
            data = self._open_files[piece.file].get_slice(piece.tensor_key)[:]
        except (OSError, SafetensorError) as error:
            raise self._broken(piece.file, f"tensor {piece.tensor_key!r} cannot be read: {error}") from error
        if not isinstance(data, Tensor) or tuple(data.shape) != (piece.length,) or data.dtype != _DTYPES[piece.dtype]:
            raise self._broken(
                piece.file, f"tensor {piece.tensor_key!r} is not [{piece.length}] of {piece.dtype} as the manifest says"
            )
        return data

    def _verify(self, record: FileRecord) -> None:
        try:
            check_sizes(self.path, [record])
            found = sha256_of(self.path / record.file)
        except CheckpointError as error:
            raise self._broken(record.file, str(error)) from error
        except OSError as error:
            raise self._broken(record.file, f"cannot be read: {error.strerror or error}") from error
        if found != record.sha256:
            raise self._broken(
                record.file,
                f"sha256 is {found}, the manifest says {record.sha256}: the data changed after it was written",
            )

    def _broken(self, file: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"shard file {file} of checkpoint {self.path.name} (step {self.step}) is broken: "
            f"{why}; {what_to_do(self.path)}"
        )

    def _refuse_holes(
        self,
        name: str,
        key: str,
        spec: ShardSpec,
        local_shape: Shape,
        start: int,
        stop: int,
        pieces: Sequence[PieceRecord],
    ) -> None:
        """Raise CheckpointError for a shard that the pieces do not cover, naming the missing flat ranges."""
        holes = missing_ranges(spec, local_shape, start, stop, [box for piece in pieces for box in piece.boxes()])
        shown = ", ".join(f"[{low}, {high})" for low, high in holes[:5]) + (", ..." if len(holes) > 5 else "")
        raise CheckpointError(
            f"{self.path.name} does not hold all of {key!r} of {name!r}: of the local shard {tuple(local_shape)} at "
            f"offset {spec.offset} along dim {spec.dim} these flat ranges are missing: "
            f"{shown or 'none, but stored pieces overlap'}"
        )
