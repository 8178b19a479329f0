"""Rotary position embedding (Su et al., RoFormer, 2021, section 3.2.2), in the half-split form that LLaMA checkpoints on the Hugging Face hub use.

A head vector is read as pairs (x_i, x_{i + d/2}); the pair i at position p is rotated by the angle p * base^(-2i / d).
"""

from typing import Any

import torch
from torch import Tensor


def rotary_tables(
    first_position: int, num_positions: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [num_positions, head_dim / 2], of the positions from `first_position` on; angles are taken in float64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(first_position, first_position + num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    x1, x2 = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1)
    out1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2)
    out2.addcmul_(x1, sin, value=sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (dy,) = grads
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1), None, None  # a rotation's transpose is the rotation back


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [batch, seq, heads, head_dim] rotated by its positions; cos and sin: [seq, head_dim / 2], dtype of x."""
    return _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call, no-any-return]
