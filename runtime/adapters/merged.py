"""Reads a checkpoint of adapters as the whole weights that they make with their base, at any layout.

W' = W + scale B A        computed in float32 (float64 for float64); W is what training held: of a base in 4 bits
                          the dequantized weight
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from trimaran.kernels import nf4
from trimaran.models.parallel.shard import Shape, ShardSpec, num_elements, whole
from trimaran.models.targets import linear_shapes
from trimaran.models.transformer import model_dtype
from trimaran.runtime.checkpoint.base import base_of, find_base
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.train.state import spec_of

_WEIGHT = ".weight"
_MATRICES = (".adapter.a", ".adapter.b")
_BASE = "base/"  # before the names of the base's files


class Merged:
    """An open checkpoint of adapters and its base; it has the reading methods of `Checkpoint`.

    Args:
        adapters: their checkpoint.
        base: the weights that they were trained beside.

    Attributes:
        path, step, state, digest: those of the adapters' checkpoint, whose state names the base.

    Raises:
        CheckpointError: the spec in the checkpoint has no adapters.
    """

    def __init__(self, adapters: Checkpoint, base: "Checkpoint | Merged") -> None:
        self.adapters, self.base = adapters, base
        self.path, self.step, self.state, self.digest = adapters.path, adapters.step, adapters.state, adapters.digest
        spec = spec_of(adapters)
        settings = None if spec.finetune is None else spec.finetune.adapter
        if settings is None:
            raise CheckpointError(f"{adapters.path} names a base, and its spec has no adapters")
        self.settings = settings
        self._dtype = model_dtype(spec.precision.dtype)
        self._linears = tuple(f".{name}{_WEIGHT}" for name in linear_shapes(spec.transformer))
        self._names = frozenset(adapters.names())

    @property
    def files(self) -> list[str]:
        """Names of the files of both, for `verify_files`."""
        return [*self.adapters.files, *(_BASE + name for name in self.base.files)]

    def verify_files(self, files: Iterable[str]) -> None:
        """Compare the named files with their manifest. Raises CheckpointError."""
        files = list(files)
        self.adapters.verify_files([name for name in files if not name.startswith(_BASE)])
        self.base.verify_files([name.removeprefix(_BASE) for name in files if name.startswith(_BASE)])

    def keys(self, name: str) -> list[str]:
        """State keys stored for a parameter of the network."""
        return ["weight"] if name in self.names() else []

    def names(self) -> list[str]:
        """Names of the network's parameters."""
        return sorted({*self.base.names(), *(name for name in self._names if not name.endswith(_MATRICES))})

    def global_shape(self, name: str, key: str) -> Shape:
        """Global shape of a parameter."""
        return (self.adapters if name in self._names else self.base).global_shape(name, key)

    def read(
        self, name: str, key: str, spec: ShardSpec, local_shape: Shape, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the local shard of a merged weight [*local_shape], float32 at least; see `Checkpoint.read`."""
        if name in self._names:  # a score head, which learned beside the adapters
            return self.adapters.read(name, key, spec, local_shape, dtype=dtype)
        found = self._held(name, key, spec, local_shape)
        layer = name.removesuffix(_WEIGHT)
        if f"{layer}.adapter.a" in self._names:
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            a, b = self._matrices(layer, spec, local_shape, found.dtype)
            found = found + (b @ a) * self.settings.scale
        return found if dtype is None else found.to(dtype)

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
        """Return elements [start, stop) of the row-major local shard."""
        return self.read(name, key, spec, local_shape, dtype=dtype).flatten()[start:stop]

    def read_global(self, name: str, key: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor."""
        shape = self.global_shape(name, key)
        return self.read(name, key, whole(shape), shape, dtype=dtype)

    def close(self) -> None:
        """Unmap the files."""
        self.adapters.close()
        self.base.close()

    def _held(self, name: str, key: str, spec: ShardSpec, local_shape: Shape) -> Tensor:
        """Return the base's weight as training held it."""
        if self.settings.base == "full" or not name.endswith(self._linears):
            return self.base.read(name, key, spec, local_shape)
        # Of the whole matrix: a cut may go through a block.
        tensor = self.base.read_global(name, key).to(self._dtype)
        parts = [
            nf4.dequantize(*nf4.quantize(matrix), tuple(matrix.shape), self._dtype)
            for matrix in tensor.view(-1, *tensor.shape[-2:])
        ]
        held = torch.stack(parts).view(tensor.shape)
        local = held.new_zeros(num_elements(local_shape)).view(local_shape)
        box = spec.box(local_shape)
        local[tuple(slice(0, high - low) for low, high in box)] = held[tuple(slice(low, high) for low, high in box)]
        return local

    def _matrices(self, layer: str, spec: ShardSpec, local_shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [..., rank, local in] and B [..., local out, rank] of the part of the weight."""
        rank, last = self.settings.rank, len(local_shape) - 1
        *leading, out, width = spec.global_shape
        *local_leading, local_out, local_width = local_shape
        cut_a, cut_b = spec.dim == last, spec.dim is not None and spec.dim < last
        a_shape, b_shape = (*leading, rank, width), (*leading, out, rank)
        a_spec = ShardSpec(spec.axis, last, a_shape, spec.offset) if cut_a else whole(a_shape)
        b_spec = ShardSpec(spec.axis, spec.dim, b_shape, spec.offset) if cut_b else whole(b_shape)
        a_local = (*(leading if not cut_a else local_leading), rank, local_width)
        a = self.adapters.read(f"{layer}.adapter.a", "weight", a_spec, a_local, dtype=dtype)
        b = self.adapters.read(f"{layer}.adapter.b", "weight", b_spec, (*local_leading, local_out, rank), dtype=dtype)
        return a, b


Weights = Checkpoint | Merged
"""What whole weights are read from."""


def open_whole(path: Path, init_from: str | None = None) -> Weights:
    """Open a checkpoint folder; one of adapters together with its base, of which its own base may be another's.

    Reads no weights.

    Args:
        init_from: where the base is now; None: where it was.

    Raises:
        CheckpointError: it, or its base, is not complete or not there.
    """
    checkpoint = Checkpoint.open(path, verify=False)
    base = base_of(checkpoint)
    return checkpoint if base is None else Merged(checkpoint, open_whole(find_base(base, init_from)))
