"""AdamW (Loshchilov and Hutter 2019, algorithm 2) over flat tensors, in one pass over memory.

p = p - lr weight_decay p
m = b1 m + (1 - b1) g
v = b2 v + (1 - b2) g^2
p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw

from trimaran.kernels.launch import launch, tuned


@dataclass(frozen=True, eq=False)
class AdamWState:
    """The tensors of one AdamW update.

    Args:
        param, grad, exp_avg, exp_avg_sq: tensors of one shape and dtype.
        step: number of steps taken [scalar float32].
        copy: a second copy of `param` in another dtype that each step writes too (the model's bfloat16 weights); same
            shape.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None = None


def adamw_(
    states: Sequence[AdamWState],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> None:
    """Take one step in place: `param`, `exp_avg`, `exp_avg_sq`, `step` and `copy` change.

    Args:
        grad_factor: multiplies the gradients (clipping). `grad` may be multiplied in place; at 1 it does not change.
    """
    if grad_factor != 1.0:
        for state in states:
            state.grad.mul_(grad_factor)
    adamw(
        [state.param for state in states],
        [state.grad for state in states],
        [state.exp_avg for state in states],
        [state.exp_avg_sq for state in states],
        [],
        [state.step for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for state in states:
        if state.copy is not None:
            state.copy.copy_(state.param)


@triton.jit
def _adamw(
    param_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    exp_avg_ptr: tl.tensor,
    exp_avg_sq_ptr: tl.tensor,
    copy_ptr: tl.tensor,
    step_ptr: tl.tensor,
    size: tl.tensor,
    lr: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    rest1: tl.tensor,
    rest2: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # In float64: 1 - beta^t loses four digits in float32 when t is small.
    step = tl.load(step_ptr).to(tl.float64)
    correction1 = (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    param = tl.load(param_ptr + at, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * grad_factor
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.float32)
    # Explicit fma and correctly rounded division and root: an element gets the same bits wherever the tensor is cut.
    param = tl.fma(-decay, param, param)
    exp_avg = tl.fma(exp_avg, beta1, rest1 * grad)
    exp_avg_sq = tl.fma(exp_avg_sq, beta2, rest2 * grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.sqrt_rn(correction2)) + eps
    param -= tl.div_rn(tl.div_rn(lr, correction1) * exp_avg, denominator)
    tl.store(param_ptr + at, param, mask=inside)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    if COPY:
        tl.store(copy_ptr + at, param, mask=inside)


def triton_adamw_(
    states: Sequence[AdamWState],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> None:
    """`adamw_` with one launch per state, for float32 or less, computed in float32; `grad` does not change.

    The kernel reads the step count on the device, so the host never waits. Raises ValueError for float64 and for
    non-contiguous tensors.
    """
    if not states:
        return
    for state in states:
        tensors = [t for t in (state.param, state.grad, state.exp_avg, state.exp_avg_sq, state.copy) if t is not None]
        if any(t.dtype == torch.float64 or not t.is_contiguous() or t.shape != state.param.shape for t in tensors):
            found = ", ".join(f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in tensors)
            raise ValueError(f"AdamW's kernel takes contiguous tensors of one shape in float32 or less, got {found}")
    torch._foreach_add_([state.step for state in states], 1.0)
    logs = [math.log(beta) if beta > 0.0 else -math.inf for beta in (beta1, beta2)]
    settings = (lr, lr * weight_decay, beta1, beta2, 1.0 - beta1, 1.0 - beta2, *logs, eps, grad_factor)
    config = tuned("adamw", states[0].param.device, "default")
    for state in states:
        size = state.param.numel()
        copy = state.param if state.copy is None else state.copy
        tensors = [state.param, state.grad, state.exp_avg, state.exp_avg_sq, copy, state.step]
        launch(
            _adamw,
            (triton.cdiv(size, config["BLOCK"]),),
            *tensors,
            size,
            *settings,
            COPY=state.copy is not None,
            **config,
        )
