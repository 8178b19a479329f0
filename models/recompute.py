"""Recomputation: a block's activations are dropped after its forward and computed again in its backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". A block then holds its input alone. Masks of dropout
are drawn by counter, so both computations drop the same elements, and collectives run again in the backward, in the
same order on all ranks. (torch.utils.checkpoint imports torch._dynamo, which takes most of a second on every rank.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimaran.models.parallel.backward import backward

Compute = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""Inputs -> outputs, a pure function of them and of parameters; called once in the forward, once in the backward."""


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        # With a graph, which is dropped at once: without gradients some operations take another, faster way, and the
        # second computation would differ from the first in its last bits.
        with torch.enable_grad():
            outputs = compute([each.detach().requires_grad_() for each in inputs])
        return tuple(each.detach() for each in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.compute(inputs)
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
            backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return None, *(each.grad for each in inputs)


def recompute(compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return `compute(inputs)`, whose activations are computed again in the backward pass; its bits are the same.

    Gradients of parameters go where the backward pass of `compute` puts them. An input must require a gradient.
    """
    return _Recomputed.apply(compute, *inputs)  # type: ignore[no-untyped-call, no-any-return]
