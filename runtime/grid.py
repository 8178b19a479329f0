"""The rank grid as arithmetic: the coordinates of a rank, the microbatches of a step.

Imports no torch; `runtime/mesh.py` builds the process groups.
"""

from collections.abc import Mapping
from math import prod

AXES = ("pp", "dp", "cp", "tp")
"""Outermost to innermost: tp ranks are neighbours, so they stay inside a node."""


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the index of a rank on each axis, by axis name.

    Args:
        sizes: axis name -> size, for every axis in AXES.
    """
    found = {}
    for index, axis in enumerate(AXES):
        inner = prod(sizes[each] for each in AXES[index + 1 :])
        found[axis] = rank // inner % sizes[axis]
    return found


def num_microbatches(global_batch_size: int, micro_batch_size: int, dp: int) -> int | None:
    """Return the microbatches of one step on every dp rank; None where the batch does not divide into whole ones."""
    count, rest = divmod(global_batch_size, micro_batch_size * dp)
    return None if rest else count


def describe_coordinates(found: Mapping[str, int]) -> str:
    """Return coordinates as text, such as `pp 1, dp 0, cp 0, tp 1`."""
    return ", ".join(f"{axis} {found[axis]}" for axis in AXES)
