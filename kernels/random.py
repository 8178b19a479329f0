"""Counter-based random numbers that depend on (seed, name, global index) and never on the layout.

Generator: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), which Triton's
`tl.rand` uses too, so that a fused kernel and this torch code draw the same mask. The torch code computes 32-bit words
in int64 tensors. Kernels draw their tiles with `keep_tile`, which gives the same bits.

A tensor counts as a matrix [rows, cols] (cols = its last dim). Element (row, col) is word `col % 4` of the block with
counter `row * ceil(cols / 4) + col // 4`. So a rank can draw any box of the tensor and pays for that box alone.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_WORDS = 4  # 32-bit words in one Philox block
_CHUNK_BLOCKS = 1 << 15  # blocks drawn at once: 32768 * 8 bytes fit a core's cache

Key = tuple[int, int]


def stream_key(seed: int, name: str) -> Key:
    """Return the two 32-bit key words of the stream `name` under `seed`: streams of different names are independent."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of each 64-bit counter.

    Args:
        counter: any shape, int64, non-negative; its low and high halves are the first two counter words, the others are
            zero.
        key: from `stream_key`.
    Returns: four int64 tensors of `counter`'s shape with values in [0, 2**32).
    """
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product may wrap in int64, but its 64 bits are correct; the mask removes the shift's sign bits.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product_0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_1.bitwise_and_(_MASK), product_0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _word_chunks(
    key: Key, rows: Tensor, num_cols: int, first_col: int, stop_col: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, stop row, words [those rows, stop_col - first_col]) in chunks that fit a cache."""
    first_block, stop_block = first_col // _WORDS, -(-stop_col // _WORDS)
    blocks = torch.arange(first_block, stop_block, device=rows.device)
    blocks_per_row = -(-num_cols // _WORDS)
    step = max(1, _CHUNK_BLOCKS // max(1, len(blocks)))
    for first in range(0, len(rows), step):
        counter = rows[first : first + step, None] * blocks_per_row + blocks
        words = torch.stack(philox(counter, key), dim=-1).flatten(1)
        skip = first_col - first_block * _WORDS
        yield first, first + len(counter), words[:, skip : skip + stop_col - first_col]


def random_words(key: Key, rows: Tensor, num_cols: int, first_col: int = 0, stop_col: int | None = None) -> Tensor:
    """Return the 32-bit words of the columns [first_col, stop_col) of the given rows.

    Args:
        rows: [n] int64, global row indices, in any order.
        num_cols: columns of the global matrix.
    Returns: [n, stop_col - first_col] int64 with values in [0, 2**32).
    """
    stop_col = num_cols if stop_col is None else stop_col
    out = torch.empty(len(rows), stop_col - first_col, dtype=torch.int64, device=rows.device)
    for first, stop, words in _word_chunks(key, rows, num_cols, first_col, stop_col):
        out[first:stop] = words
    return out


def keep_mask(
    key: Key, rows: Tensor, num_cols: int, rate: float, first_col: int = 0, stop_col: int | None = None
) -> Tensor:
    """Return a bool mask [n, columns], False with probability `rate`; other arguments as in `random_words`."""
    stop_col = num_cols if stop_col is None else stop_col
    out = torch.empty(len(rows), stop_col - first_col, dtype=torch.bool, device=rows.device)
    for first, stop, words in _word_chunks(key, rows, num_cols, first_col, stop_col):
        torch.ge(words, keep_threshold(rate), out=out[first:stop])
    return out


def keep_threshold(rate: float) -> int:
    """Return the smallest 32-bit word that keeps its element; ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, got {rate}")
    return min(round(rate * 2**32), _MASK)  # a rate that rounds to 1 must still fit 32 bits


def keep_arguments(key: Key, rate: float) -> tuple[int, int, int]:
    """Return (key0, key1, threshold) for `keep_tile`: the unsigned words as signed 32-bit integers of the same bits.

    Every key and rate then has one type in the kernel's signature. List the three in
    `triton.jit(do_not_specialize=[...])`, or Triton compiles the kernel again for words that are 1 or divisible by 16.
    """
    key0, key1, threshold = (word - 2**32 if word >= 2**31 else word for word in (*key, keep_threshold(rate)))
    return key0, key1, threshold


@triton.jit
def keep_tile(
    row: tl.tensor,
    first_col: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    num_blocks: tl.tensor,
    threshold: tl.tensor,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Return a tile [ROWS, COLS] bool of `keep_mask(key, rows, num_cols, rate)`; one Philox block makes four columns.

    Args:
        row: [ROWS] int64, global row indices. Rows and columns past the end give meaningless values.
        first_col: the tile's first column, a multiple of 4.
        key0, key1, threshold: from `keep_arguments`; any integer type with the right low 32 bits.
        num_blocks: ceil(num_cols / 4), of the global matrix.
        COLS: a power of two, at least 4.
    """
    block = first_col // 4 + tl.arange(0, COLS // 4)
    counter = row[:, None] * num_blocks + block[None, :]
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0, k1 = tl.cast(key0, tl.uint32), tl.cast(key1, tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, zero, zero, k0, k1)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.cast(threshold, tl.uint32)


def _box_muller(words: Tensor) -> Tensor:
    """Return standard normals float64 for words [n, 2k]; words 2i and 2i + 1 make a pair (Box and Muller 1958)."""
    uniform = (words.double() + 0.5) * 2.0**-32
    radius = uniform[:, 0::2].log().mul_(-2).sqrt_()
    angle = uniform[:, 1::2] * (2 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)


def box_rows(global_shape: tuple[int, ...], dim: int | None, offset: int, length: int, device: torch.device) -> Tensor:
    """Return the global row indices [n] int64 of a box.

    The box is the tensor with `dim` (not the last; None: not cut) narrowed to [offset, offset + length).
    """
    leading = global_shape[:-1]
    rows = torch.arange(math.prod(leading), device=device).view(leading)
    return (rows if dim is None else rows.narrow(dim, offset, length)).flatten()


def _of_rows(stds: Sequence[float], rows: Tensor, global_shape: tuple[int, ...]) -> Tensor:
    """Return each row's standard deviation [n, 1] float64, from one for each index of the first dim."""
    return torch.tensor(stds, dtype=torch.float64, device=rows.device)[rows // math.prod(global_shape[1:-1])].unsqueeze(
        1
    )


def fill_normal_(
    out: Tensor,
    *,
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    dim: int | None,
    offset: int,
    std: float | Sequence[float],
) -> None:
    """Fill `out` with its part of the global normal tensor `name`: mean 0, standard deviation `std`.

    Args:
        out: local shard, any float dtype; the box of `global_shape` with `dim` narrowed to [offset, offset +
            out.shape[dim]). Elements past the global tensor (vocabulary padding) become zero.
        dim: the dim that is cut, or None.
        std: one number, or one for each index of the first dim.
    Values are drawn in float64 and rounded to float32 first, so that every dtype starts from the same float32 weights.
    """
    if dim is not None:
        length = max(0, min(out.shape[dim], global_shape[dim] - offset))
        out.narrow(dim, length, out.shape[dim] - length).zero_()
        out = out.narrow(dim, 0, length)
    if out.numel() == 0:
        return
    last = len(global_shape) - 1
    cut_rows = dim is not None and dim != last
    rows = box_rows(
        global_shape,
        dim if cut_rows else None,
        offset,
        out.shape[dim] if dim is not None and cut_rows else 0,
        out.device,
    )
    first_col = offset if dim == last else 0
    stop_col = first_col + out.shape[-1]
    deviation = _of_rows(std, rows, global_shape) if isinstance(std, Sequence) else std
    # Box-Muller pairs must not depend on the cut: draw whole pairs, then drop the columns outside.
    first_pair, stop_pair = first_col - first_col % 2, min(stop_col + stop_col % 2, -(-global_shape[-1] // 2) * 2)
    matrix = out.view(-1, out.shape[-1]) if out.is_contiguous() else None
    values = (
        torch.empty(out.shape, dtype=out.dtype, device=out.device).view(-1, out.shape[-1]) if matrix is None else matrix
    )
    for first, stop, words in _word_chunks(stream_key(seed, name), rows, global_shape[-1], first_pair, stop_pair):
        normals = _box_muller(words)[:, first_col - first_pair : stop_col - first_pair]
        values[first:stop] = (
            normals.mul_(deviation[first:stop] if isinstance(deviation, Tensor) else deviation).float().to(out.dtype)
        )
    if matrix is None:
        out.copy_(values.view(out.shape))
