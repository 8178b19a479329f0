"""Starting a backward pass from gradients that were computed elsewhere: by another stage, or by a recomputed block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _GivenGradients(torch.autograd.Function):
    """A zero whose backward pass gives each of `grads` to the output in its place, unchanged."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


def backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Run the backward pass of `outputs` from their gradients `grads`, which have their shapes.

    Equivalent to `torch.autograd.backward(outputs, grads)`, which imports sympy on its first call with a gradient: a
    second of CPU time on every rank before its first step.
    """
    _GivenGradients.apply(grads, *outputs).backward()  # type: ignore[no-untyped-call]
