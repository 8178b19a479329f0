"""The rank grid as arithmetic: which coordinates a rank has. Imports no torch; `runtime/mesh.py` builds the groups over it."""

from collections.abc import Mapping
from math import prod

AXES = ("pp", "dp", "cp", "tp")
"""Outermost to innermost: tp ranks are neighbours, so they stay inside a node."""


def coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the index of a rank on each axis, by the axis's name.

    Args:
        sizes: of every axis in AXES.
    """
    found = {}
    for index, axis in enumerate(AXES):
        inner = prod(sizes[each] for each in AXES[index + 1 :])
        found[axis] = rank // inner % sizes[axis]
    return found


def describe_coordinates(found: Mapping[str, int]) -> str:
    """Return coordinates for people, such as `pp 1, dp 0, cp 0, tp 1`."""
    return ", ".join(f"{axis} {found[axis]}" for axis in AXES)
