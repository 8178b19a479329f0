"""Which examples share a row: best-fit decreasing. No torch.

Best-fit decreasing needs at most 11/9 of the fewest possible rows, and a few more (Johnson 1973). Examples of real
answers fill over 99% of the tokens of a row.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Rows = list[tuple[int, ...]]
ROW_MULTIPLE: Final = 32
"""Tokens: the length of rows is rounded up to a multiple of this, so that kernels meet few lengths."""


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> Rows:
    """Return the numbers of the examples of each row, ascending; rows in the order of their first example.

    The longest example comes first, of equal ones the first, into the fullest row that has room for it. The result
    depends on the arguments alone.

    Args:
        lengths: [examples], tokens of each, at most `capacity`.
        capacity: tokens of a row.
    Raises ValueError for an example that no row holds.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.max()) > capacity:
        index = int(sizes.argmax())
        raise ValueError(f"example {index} has {int(sizes[index])} tokens, a row only {capacity}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens that are free -> rows, the first one last
    free: list[int] = []  # the keys, ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        place = bisect_left(free, size)
        if place == len(free):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = free[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], free[place]
        rows[row].append(index)
        room -= size
        if room:
            if room not in with_room:
                insort(free, room)
            with_room.setdefault(room, []).append(row)
    return sorted(tuple(sorted(row)) for row in rows)


def one_a_row(num_examples: int) -> Rows:
    """Return rows of one example each."""
    return [(index,) for index in range(num_examples)]


def row_multiple(tp: int) -> int:
    """Return what the length of rows is a multiple of: tp ranks that share a sequence take equal parts of it."""
    return math.lcm(ROW_MULTIPLE, tp)
