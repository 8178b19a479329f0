"""Starting a backward pass from a gradient that another stage computed."""

from typing import Any

import torch
from torch import Tensor


class _GivenGradient(torch.autograd.Function):
    """A zero whose backward pass gives `grad` to `output` unchanged."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.grad, None


def backward(output: Tensor, grad: Tensor) -> None:
    """Run the backward pass of `output` from the gradient `grad`, which has its shape.

    Equivalent to `torch.autograd.backward(output, grad)`, which imports sympy on its first call with a gradient: a
    second of CPU time on every rank before its first step.
    """
    _GivenGradient.apply(output, grad).backward()  # type: ignore[no-untyped-call]
