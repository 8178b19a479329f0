"""`keep_tile` in the interpreter: bit for bit the mask that torch draws."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.launch import launch
from trimaran.kernels.random import keep_arguments, keep_mask, keep_tile, stream_key


@triton.jit(do_not_specialize=["key0", "key1", "threshold"])
def _draw(
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    threshold: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    row = tl.load(rows_ptr + at, mask=at < num_rows, other=0)
    keep = keep_tile(row, first_col, key0, key1, tl.cdiv(num_cols, 4), threshold, COLS)
    cols = first_col + tl.arange(0, COLS)
    inside = (at < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(out_ptr + at[:, None] * num_cols + cols[None, :], keep, mask=inside)


def draw(key: tuple[int, int], rows: Tensor, num_cols: int, rate: float, tile: tuple[int, int]) -> Tensor:
    """The mask by `keep_tile`, as `keep_mask` has it."""
    out = torch.empty(len(rows), num_cols, dtype=torch.bool)
    grid = (triton.cdiv(len(rows), tile[0]), triton.cdiv(num_cols, tile[1]))
    launch(_draw, grid, rows, out, len(rows), num_cols, *keep_arguments(key, rate), ROWS=tile[0], COLS=tile[1])
    return out


TILES = {(1, 4): (1, 4, 6, 9), (2, 16): (1, 4, 6, 37), (8, 64): (1, 4, 6, 37, 64)}


@pytest.mark.parametrize(("tile", "num_cols"), [(tile, cols) for tile, widths in TILES.items() for cols in widths])
def test_a_tile_is_the_mask_of_torch(tile: tuple[int, int], num_cols: int) -> None:
    key, rows = stream_key(5, "mask"), torch.tensor([0, 1, 2, 9, 4095])
    assert draw(key, rows, num_cols, 0.3, tile).equal(keep_mask(key, rows, num_cols, 0.3))


def test_counters_that_need_more_than_32_bits() -> None:
    rows = torch.tensor([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 7, 2**52 + 3])
    for num_cols in (3, 16, 29):
        assert draw((7, 8), rows, num_cols, 0.5, (4, 16)).equal(keep_mask((7, 8), rows, num_cols, 0.5))


@pytest.mark.parametrize("rate", [0.0, 2.0**-33, 2.0**-20, 0.1, 0.5, 0.999, 1 - 2.0**-30, 1 - 2.0**-50])
def test_any_rate(rate: float) -> None:
    key, rows = stream_key(3, "rates"), torch.arange(40)
    assert draw(key, rows, 64, rate, (8, 64)).equal(keep_mask(key, rows, 64, rate))


@pytest.mark.parametrize("key", [(0, 0), (1, 16), (2**32 - 1, 2**32 - 1), (2**31, 2**31 - 1)])
def test_any_key_words(key: tuple[int, int]) -> None:
    rows = torch.arange(5)
    assert draw(key, rows, 30, 0.4, (2, 16)).equal(keep_mask(key, rows, 30, 0.4))
