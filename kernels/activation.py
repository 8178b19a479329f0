"""The feed-forward nonlinearities: GELU (Hendrycks and Gimpel 2016), its tanh form (GPT-2), and SwiGLU (Shazeer 2020, equation 6).

gelu(x) = x * Phi(x)        swiglu(gate, up) = silu(gate) * up, silu(z) = z * sigmoid(z)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Return x * Phi(x), elementwise."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU, elementwise (Hendrycks and Gimpel 2016, section 2; used by GPT-2)."""
    return F.gelu(x, approximate="tanh")


class _SwiGLU(torch.autograd.Function):
    """Saves only the input: silu is recomputed in the backward pass, cheaper than keeping a second [.., ffn] activation."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (dy,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., ffn] for gate_up [..., 2 * ffn] with the gate in the first half of the last dim."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call, no-any-return]
