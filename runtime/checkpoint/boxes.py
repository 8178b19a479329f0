"""Integer geometry of shards: flat ranges of row-major boxes, their overlap and their coverage. No torch, no files.

A flat range of a row-major box of n dims is the union of at most 2n - 1 boxes (a ragged start, whole rows, a ragged
end, per dim). Resharding a checkpoint only intersects such boxes, so no loop runs over rows or elements.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from trimaran.models.parallel.shard import Box, Shape, ShardSpec


def volume(box: Box) -> int:
    """Number of elements in the box; 1 for the box of a scalar."""
    return prod(high - low for low, high in box)


def strides(shape: Shape) -> Shape:
    """Row-major strides of `shape` in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def flat_index(point: Sequence[int], shape: Shape) -> int:
    """Row-major index of `point` in a tensor of `shape`."""
    return sum(index * stride for index, stride in zip(point, strides(shape), strict=True))


def flat_boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    """The disjoint boxes that make up the flat range [start, stop) of a row-major tensor of `shape`, in order."""
    if start >= stop:
        return []
    if not shape:
        return [()]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return [((first, first + 1), *rest) for rest in flat_boxes(shape[1:], start - first * row, stop - first * row)]
    boxes: list[Box] = []
    if start % row:
        boxes += [((first, first + 1), *rest) for rest in flat_boxes(shape[1:], start - first * row, row)]
        first += 1
    end = stop // row
    if first < end:
        boxes.append(((first, end), *((0, length) for length in shape[1:])))
    if stop % row:
        boxes += [((end, end + 1), *rest) for rest in flat_boxes(shape[1:], 0, stop - end * row)]
    return boxes


def intersect(a: Box, b: Box) -> Box | None:
    """The intersection of two boxes, or None where they are disjoint."""
    shared = tuple(
        (max(low_a, low_b), min(high_a, high_b)) for (low_a, high_a), (low_b, high_b) in zip(a, b, strict=True)
    )
    return None if any(low >= high for low, high in shared) else shared


def global_boxes(spec: ShardSpec, local_shape: Shape, start: int, stop: int) -> list[Box]:
    """Boxes of the global tensor that the flat range [start, stop) of a local shard holds, without padding."""
    inside = spec.box(local_shape)
    boxes = []
    for box in flat_boxes(local_shape, start, stop):
        moved = box
        if spec.dim is not None:
            low, high = box[spec.dim]
            moved = (*box[: spec.dim], (low + spec.offset, high + spec.offset), *box[spec.dim + 1 :])
        if (real := intersect(moved, inside)) is not None:
            boxes.append(real)
    return boxes


def local_start(box: Box, spec: ShardSpec, local_shape: Shape) -> int:
    """Flat index in the local shard of the first element of a global `box` that lies inside it."""
    point = [low for low, _ in box]
    if spec.dim is not None:
        point[spec.dim] -= spec.offset
    return flat_index(point, local_shape)


def trim_padding(spec: ShardSpec, local_shape: Shape, start: int, stop: int) -> tuple[int, int]:
    """The smallest flat range inside [start, stop) with every real element; (start, start) where all of it is padding.

    Vocabulary padding is the tail of the shard and is cut off whole. Padding on an inner dim lies between real
    elements: it stays in the range, and a reader of the range skips it by `global_boxes`.
    """
    boxes = global_boxes(spec, local_shape, start, stop)
    if not boxes:
        return start, start
    last = tuple((high - 1, high) for _, high in boxes[-1])
    return local_start(boxes[0], spec, local_shape), local_start(last, spec, local_shape) + 1


def first_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Positions of two boxes that share an element, or None. The boxes are of one tensor and not empty."""
    if len(boxes) < 2:
        return None
    if not boxes[0]:
        return 0, 1  # a scalar has one element, so two boxes overlap
    bounds = np.array(boxes, dtype=np.int64)  # [boxes, dims, 2]
    order = np.argsort(bounds[:, 0, 0], kind="stable")
    low, high = bounds[order, :, 0], bounds[order, :, 1]
    ends = np.searchsorted(low[:, 0], high[:, 0], side="left")
    for i, end in enumerate(ends.tolist()):
        # Sorted by the first dim, box i can only overlap boxes i+1 .. end; the other dims decide.
        meets = np.all((low[i + 1 : end] < high[i]) & (high[i + 1 : end] > low[i]), axis=1)
        if meets.any():
            first, second = int(order[i]), int(order[i + 1 + int(meets.argmax())])
            return min(first, second), max(first, second)
    return None


def missing_ranges(
    spec: ShardSpec, local_shape: Shape, start: int, stop: int, held: Sequence[Box]
) -> list[tuple[int, int]]:
    """Flat ranges inside [start, stop) of the local shard whose real elements no box of `held` covers.

    Allocates one byte for each element of the range, so only error paths call it.
    """
    lacks = np.zeros(stop - start, dtype=np.bool_)
    for wanted in global_boxes(spec, local_shape, start, stop):
        _box_view(lacks, wanted, spec, local_shape, start)[...] = True
        for box in held:
            if (shared := intersect(wanted, box)) is not None:
                _box_view(lacks, shared, spec, local_shape, start)[...] = False
    edges = np.flatnonzero(np.diff(lacks.astype(np.int8), prepend=0, append=0)) + start
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]


def _box_view(flat: np.ndarray, box: Box, spec: ShardSpec, local_shape: Shape, start: int) -> np.ndarray:
    """A writable view of the elements of global `box` in `flat`, the local shard's flat range from `start` on."""
    shape = tuple(high - low for low, high in box)
    return np.lib.stride_tricks.as_strided(
        flat[local_start(box, spec, local_shape) - start :], shape, strides(local_shape)
    )
