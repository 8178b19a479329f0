"""Layer normalisation (Ba et al. 2016) and root-mean-square normalisation (Zhang and Sennrich 2019, equation 4): the torch twins.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight

Statistics are taken over the last dim. LayerNorm is torch's own fused operator. RMSNorm carries its own backward, because torch decomposes
that on a CPU into some twenty operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return layer_norm(x), shape and dtype of x: [..., hidden]; weight and bias: [hidden]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.flatten(0, -2)
        wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows  # the statistics need float32 at least
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, rstd)
        out: Tensor = (wide * rstd).to(x.dtype).mul_(weight).view(x.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (dy,) = grads
        x, weight, rstd = ctx.saved_tensors
        wide = rstd.dtype
        x, weight_wide, dy_rows = x.to(wide), weight.to(wide), dy.flatten(0, -2).to(wide)
        product = dy_rows * x
        dweight = torch.mv(product.t(), rstd.squeeze(-1))
        # dx = rstd * dy * weight - x * rstd^3 * mean(dy * weight * x)
        mean = torch.mv(product, weight_wide).unsqueeze_(-1).div_(x.shape[-1])
        dx = torch.mul(dy_rows, weight_wide).mul_(rstd).addcmul_(x, mean.mul_(rstd.pow(3)), value=-1)
        return dx.to(dy.dtype).view(dy.shape), dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x), shape and dtype of x: [..., hidden]; weight: [hidden]. Statistics are float32 at least."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call, no-any-return]
