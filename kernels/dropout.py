"""Dropout (Srivastava et al. 2014, section 4, scaled in training) with a counter-based mask, the same at every layout.

    y = keep x / (1 - rate)           dx = keep dy / (1 - rate)
    y = r + keep x / (1 - rate)       dr = dy                       with a residual stream r

The Triton kernels store no mask: the backward pass draws it again from the key, which costs arithmetic but no memory.
"""

from typing import Any, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimaran.kernels.checks import check_residual
from trimaran.kernels.launch import launch, tuned
from trimaran.kernels.random import keep_arguments, keep_mask, keep_tile, stream_key


class DropoutPosition(TypedDict):
    """Which numbers of the run's random stream a call draws: the keyword arguments of `dropout`, described there."""

    seed: int
    site: str
    first_sample: int
    first_position: int
    seq_len: int


def dropout(
    x: Tensor, rate: float, *, seed: int, site: str, first_sample: int, first_position: int, seq_len: int
) -> Tensor:
    """Return x with elements zeroed with probability `rate` and the rest divided by 1 - rate.

    Args:
        x: [batch, local seq, hidden]; its samples are first_sample, first_sample + 1, ... of the whole run, its
            positions first_position, first_position + 1, ... of seq_len.
        rate: in [0, 1), else ValueError.
        site: global name of this dropout in the network; it contains the layer's number.
    """
    if rate == 0.0:
        return x
    batch, local_seq, hidden = x.shape
    sample = torch.arange(first_sample, first_sample + batch, device=x.device)[:, None]
    position = torch.arange(first_position, first_position + local_seq, device=x.device)[None, :]
    keep = keep_mask(stream_key(seed, site), (sample * seq_len + position).flatten(), hidden, rate)
    return x * keep.view(x.shape) / (1.0 - rate)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    rate: float,
    *,
    seed: int,
    site: str,
    first_sample: int,
    first_position: int,
    seq_len: int,
) -> Tensor:
    """Return residual + dropout(x) in x's dtype; residual: of x's shape. Other arguments as in `dropout`.

    Raises ValueError where the shapes of x and residual differ.
    """
    check_residual(x, residual)
    if rate == 0.0:
        return (residual + x).to(x.dtype)
    where = {"first_sample": first_sample, "first_position": first_position, "seq_len": seq_len}
    return dropout(x, rate, seed=seed, site=site, **where).add_(residual)


@triton.jit(do_not_specialize=["key0", "key1", "threshold", "first_sample", "first_position"])
def _dropout(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    threshold: tl.tensor,
    first_sample: tl.tensor,
    first_position: tl.tensor,
    seq_len: tl.tensor,
    local_seq: tl.tensor,
    num_rows: tl.tensor,
    hidden: tl.tensor,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    cols = first_col + tl.arange(0, COLS)
    sample = row // local_seq  # in 32 bits: a 64-bit division would be a third of the kernel's arithmetic
    global_row = (first_sample + sample.to(tl.int64)) * seq_len + first_position + (row - sample * local_seq)
    keep = keep_tile(global_row, first_col, key0, key1, tl.cdiv(hidden, 4), threshold, COLS)
    at = row.to(tl.int64)[:, None] * hidden + cols[None, :]
    inside = (row < num_rows)[:, None] & (cols < hidden)[None, :]
    y = tl.where(keep, tl.load(x_ptr + at, mask=inside).to(tl.float32) * scale, 0.0)
    if ADD:
        y += tl.load(residual_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, y, mask=inside)


class _TritonDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, rate: float, key: tuple[int, int], where: tuple[int, int, int]
    ) -> Tensor:
        ctx.rate, ctx.key, ctx.where = rate, key, where
        return _drop(x, residual, rate, key, where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None, None]:
        (dy,) = grads
        return _drop(dy, None, ctx.rate, ctx.key, ctx.where), dy if ctx.needs_input_grad[1] else None, None, None, None


def _drop(x: Tensor, residual: Tensor | None, rate: float, key: tuple[int, int], where: tuple[int, int, int]) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = tuned("dropout", x.device, "default")
    block, (batch, local_seq, hidden) = config.pop("BLOCK"), x.shape
    cols = max(4, min(block, triton.next_power_of_2(hidden)))
    grid = (triton.cdiv(batch * local_seq, block // cols), triton.cdiv(hidden, cols))
    sizes = (*where, local_seq, batch * local_seq, hidden)
    tensors = (x.contiguous(), y if residual is None else residual.contiguous(), y)
    constants = {"ADD": residual is not None, "ROWS": block // cols, "COLS": cols}
    launch(_dropout, grid, *tensors, 1.0 / (1.0 - rate), *keep_arguments(key, rate), *sizes, **constants, **config)
    return y


def triton_dropout(
    x: Tensor, rate: float, *, seed: int, site: str, first_sample: int, first_position: int, seq_len: int
) -> Tensor:
    """`dropout` in one pass over memory, forward and backward, without a stored mask."""
    if rate == 0.0:
        return x
    where = (first_sample, first_position, seq_len)
    return _TritonDropout.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, None, rate, stream_key(seed, site), where
    )


def triton_dropout_add(
    x: Tensor,
    residual: Tensor,
    rate: float,
    *,
    seed: int,
    site: str,
    first_sample: int,
    first_position: int,
    seq_len: int,
) -> Tensor:
    """`dropout_add` in one pass over memory, forward and backward, without a stored mask."""
    check_residual(x, residual)
    if rate == 0.0:
        return (residual + x).to(x.dtype)
    where = (first_sample, first_position, seq_len)
    return _TritonDropout.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, residual, rate, stream_key(seed, site), where
    )
