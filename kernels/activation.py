"""Activations: GELU (Hendrycks and Gimpel 2016), its tanh form (GPT-2), gated SwiGLU and GeGLU (Shazeer 2020, eq. 6).

    gelu(x) = x Phi(x)      gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))      silu(x) = x sigmoid(x)
    gated: y = f(gate) * up, so that  dgate = dy * up * f'(gate),  dup = dy * f(gate)

The backward pass keeps only the input and computes f again, which costs less than a second [.., ffn] activation. The
Triton kernels read and write each element once and compute in float32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimaran.kernels.autograd import apply
from trimaran.kernels.launch import launch, rows_of, tuned

Kind = Literal["gelu", "gelu_tanh", "silu"]


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0), elementwise. Both kernel sets use torch's, which is one pass over memory already."""
    return F.relu(x)


def gelu(x: Tensor) -> Tensor:
    """Return x * Phi(x), elementwise."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU, elementwise (Hendrycks and Gimpel 2016, section 2; used by GPT-2)."""
    return F.gelu(x, approximate="tanh")


_aten = torch.ops.aten
_FUNCTIONS: Mapping[Kind, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = MappingProxyType(
    {
        "silu": (F.silu, _aten.silu_backward.grad_input, {}),
        "gelu": (F.gelu, _aten.gelu_backward.grad_input, {"approximate": "none"}),
        "gelu_tanh": (F.gelu, _aten.gelu_backward.grad_input, {"approximate": "tanh"}),
    }
)
"""kind -> (f, its backward pass into a given tensor, further arguments of both)."""


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kind: Kind) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        function, _, form = _FUNCTIONS[kind]
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate, **form).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (dy,) = grads
        (gate_up,) = ctx.saved_tensors
        function, backward_into, form = _FUNCTIONS[ctx.kind]
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, dim=-1)
        torch.mul(dy, function(gate, **form), out=dup)
        backward_into(dy * up, gate, **form, grad_input=dgate)
        return out, None


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., ffn] for gate_up [..., 2 * ffn] with the gate in the first half of the last dim."""
    out: Tensor = apply(_Gated, gate_up, "silu")
    return out


def geglu(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up [..., ffn] for gate_up [..., 2 * ffn] with the gate in the first half of the last dim."""
    out: Tensor = apply(_Gated, gate_up, "gelu")
    return out


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """Return gelu_tanh(gate) * up [..., ffn]; gate_up as in `geglu` (Gemma's form)."""
    out: Tensor = apply(_Gated, gate_up, "gelu_tanh")
    return out


@triton.jit
def _value_and_slope(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """f(x) and f'(x), float32."""
    if KIND == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # sqrt(1/2)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1/sqrt(2 pi)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2/pi)
    sigmoid = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return x * sigmoid, sigmoid + 2.0 * x * sigmoid * (1.0 - sigmoid) * slope


@triton.jit
def _activation_forward(
    x_ptr: tl.tensor, y_ptr: tl.tensor, width: tl.tensor, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    x_row = x_ptr + row * width * (2 if GATED else 1)
    y, _ = _value_and_slope(tl.load(x_row + cols, mask=inside).to(tl.float32), KIND)
    if GATED:
        y *= tl.load(x_row + width + cols, mask=inside).to(tl.float32)
    tl.store(y_ptr + row * width + cols, y, mask=inside)


@triton.jit
def _activation_backward(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    first = row * width * (2 if GATED else 1)
    dy = tl.load(dy_ptr + row * width + cols, mask=inside).to(tl.float32)
    y, slope = _value_and_slope(tl.load(x_ptr + first + cols, mask=inside).to(tl.float32), KIND)
    if GATED:
        up = tl.load(x_ptr + first + width + cols, mask=inside).to(tl.float32)
        tl.store(dx_ptr + first + width + cols, dy * y, mask=inside)
        slope *= up
    tl.store(dx_ptr + first + cols, dy * slope, mask=inside)


class _TritonActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, gated: bool) -> Tensor:
        rows = rows_of(x)
        ctx.kind, ctx.gated, ctx.shape = kind, gated, x.shape
        ctx.save_for_backward(rows)
        width = rows.shape[1] // 2 if gated else rows.shape[1]
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        config = tuned("activation", x.device, "default")
        grid = (len(rows), triton.cdiv(width, config["BLOCK"]))
        launch(_activation_forward, grid, rows, y, width, KIND=kind, GATED=gated, **config)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        dy = rows_of(grads[0])
        dx = torch.empty_like(rows)
        width = dy.shape[1]
        config = tuned("activation", dy.device, "default")
        grid = (len(rows), triton.cdiv(width, config["BLOCK"]))
        launch(_activation_backward, grid, dy, rows, dx, width, KIND=ctx.kind, GATED=ctx.gated, **config)
        return dx.view(ctx.shape), None, None


def _triton(kind: Kind, gated: bool) -> Callable[[Tensor], Tensor]:
    def activation(x: Tensor) -> Tensor:
        out: Tensor = _TritonActivation.apply(x, kind, gated)  # type: ignore[no-untyped-call]
        return out

    return activation


triton_gelu, triton_gelu_tanh = _triton("gelu", False), _triton("gelu_tanh", False)
triton_swiglu, triton_geglu, triton_geglu_tanh = (
    _triton("silu", True),
    _triton("gelu", True),
    _triton("gelu_tanh", True),
)
