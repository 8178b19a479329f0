"""Starting a backward pass from a gradient that another stage computed."""

from typing import Any

import torch
from torch import Tensor


class _GivenGradient(torch.autograd.Function):
    """Zero, whose backward pass hands `grad` to `output` as it is."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.grad, None


def backward(output: Tensor, grad: Tensor) -> None:
    """Run the backward pass of `output` with the gradient `grad` of its shape.

    The same as `torch.autograd.backward(output, grad)`, which however imports sympy the first time it is given a
    gradient: a second of CPU time on every rank before its first step.
    """
    _GivenGradient.apply(output, grad).backward()  # type: ignore[no-untyped-call]
