"""How a parameter is cut: tensor parallelism writes this record; ZeRO, clipping, counting and checkpoint read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""A half-open range [low, high) per dim."""


def num_elements(shape: Sequence[int]) -> int:
    """Return the elements of a tensor of this shape; 1 for a scalar."""
    return prod(shape)


@dataclass(frozen=True)
class ShardSpec:
    """Where a local shard lies in its global tensor: `global_shape` with `dim` cut at [offset, offset + local length).

    Args:
        axis: mesh axis the tensor is cut over ("tp", "ep", ...); None for a tensor that every rank holds whole.
        dim: tensor dim that is cut; None exactly when `axis` is None.
        global_shape: true shape of the whole tensor, without padding.
        offset: global index along `dim` of the local shard's first row. Rows at or past ``global_shape[dim]`` are
            padding, so a shard may be padded in part or altogether (a vocabulary rounded up to a multiple of tp).

    Raises:
        ValueError: the fields contradict each other.
    """

    axis: str | None
    dim: int | None
    global_shape: Shape
    offset: int = 0

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.dim is None):
            raise ValueError(
                f"axis ({self.axis!r}) and dim ({self.dim!r}) must both be given (a cut tensor) "
                "or both be None (a whole one)"
            )
        if self.dim is None and self.offset != 0:
            raise ValueError(f"offset ({self.offset}) must be 0 for a tensor that is not cut; give axis and dim")
        if self.dim is not None and not 0 <= self.dim < len(self.global_shape):
            raise ValueError(
                f"dim ({self.dim}) must be in [0, {len(self.global_shape)}) for global_shape {self.global_shape}"
            )
        if self.offset < 0 or any(length < 0 for length in self.global_shape):
            raise ValueError(f"offset ({self.offset}) and global_shape {self.global_shape} must not be negative")

    def check(self, local_shape: Shape) -> None:
        """Raise ValueError unless `local_shape` is a possible shard of the global tensor."""
        local, expected = list(local_shape), list(self.global_shape)
        if self.dim is not None and len(local) == len(expected):
            local[self.dim] = expected[self.dim] = 0
        if local != expected:
            where = "equal" if self.dim is None else f"differ only in dim {self.dim} from"
            raise ValueError(f"local_shape {tuple(local_shape)} must {where} global_shape {self.global_shape}")

    def real_length(self, local_shape: Shape) -> int:
        """Return the local rows along `dim` that are no padding. The tensor must be cut."""
        assert self.dim is not None, "a tensor that is not cut has no cut dim to measure"
        return max(0, min(local_shape[self.dim], self.global_shape[self.dim] - self.offset))

    def box(self, local_shape: Shape) -> Box:
        """Return the part of the global tensor in this shard, one half-open range per dim, without padding."""
        ranges = [(0, length) for length in local_shape]
        if self.dim is not None:
            ranges[self.dim] = (self.offset, self.offset + self.real_length(local_shape))
        return tuple(ranges)

    def num_real_elements(self, local_shape: Shape) -> int:
        """Return the number of elements of the local shard that are no padding."""
        return prod(high - low for low, high in self.box(local_shape))


def whole(global_shape: Sequence[int]) -> ShardSpec:
    """Return the spec of a tensor that is not cut; its local shape is `global_shape`."""
    return ShardSpec(axis=None, dim=None, global_shape=tuple(global_shape))


def cut_evenly(
    global_shape: Sequence[int], axis: str, dim: int, index: int, count: int, unit: int = 1
) -> tuple[ShardSpec, Shape]:
    """Return spec and local shape of shard `index` of `count` equal shards along `dim`.

    The last shards are padded where `count` does not divide the length.

    Args:
        global_shape: shape of the whole tensor, without padding.
        axis: mesh axis the tensor is cut over.
        dim: tensor dim that is cut.
        index: this rank's position on `axis`, in [0, count).
        count: size of `axis`.
        unit: rows that must stay together; a shard's length is a multiple of it.

    Raises:
        ValueError: `index` is not in [0, count), or `dim` is not a dim of the tensor.
    """
    shape = tuple(global_shape)
    if not 0 <= index < count:
        raise ValueError(f"index ({index}) must be in [0, {count})")
    if not 0 <= dim < len(shape):
        raise ValueError(f"dim ({dim}) must be in [0, {len(shape)}) for global_shape {shape}")
    length = -(-shape[dim] // (unit * count)) * unit
    spec = ShardSpec(axis=axis, dim=dim, global_shape=shape, offset=index * length)
    return spec, (*shape[:dim], length, *shape[dim + 1 :])


@dataclass(frozen=True, eq=False)
class ShardPiece:
    """A flat range of one rank's local shard of one state tensor, for the checkpoint.

    Args:
        name: the parameter's global name, for example ``layers.0.attention.q.weight``.
        key: which state: "weight", "exp_avg" or "exp_avg_sq".
        data: [length], float32, float64 or bfloat16, contiguous: elements [start, start + length) of the row-major
            local shard.
        spec: the local shard's place in the global tensor.
        local_shape: shape of the local shard, padding included.
        start: flat index in the local shard of ``data[0]``.
    """

    name: str
    key: str
    data: Tensor
    spec: ShardSpec
    local_shape: Shape
    start: int
