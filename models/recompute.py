"""Recomputation: activations are dropped after a block's forward and computed again in its backward.

`recompute` drops all of a block, which then holds its input alone (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"). Masks of dropout are drawn by counter, so both computations drop the same elements, and collectives run
again in the backward, in the same order on all ranks. (torch.utils.checkpoint imports torch._dynamo, which takes most
of a second on every rank.)

`Droppable` drops what is cheap to compute from what a block keeps anyway, without a collective or a large product
(Korthikanti et al. 2022, section 5): norms, activations, rotated heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, eq=False)
class _Dropped:
    """What stands for a tensor that autograd would have saved: a view of what `compute` returns."""

    compute: Callable[[], Tensor]
    size: torch.Size
    stride: Sequence[int | torch.SymInt]
    offset: int | torch.SymInt


class Droppable:
    """The tensors of the block that runs now which autograd need not save, and how to compute them again.

    Args:
        is_on: whether to drop them.
    """

    def __init__(self, *, is_on: bool = False) -> None:
        self.is_on = is_on
        # A tensor stays here until its block ends: memory that another one took over would be mistaken for it.
        self._offered: dict[int, tuple[Tensor, Callable[[], Tensor]]] | None = None

    def offer(self, x: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `x`, which is `compute(*inputs)`, of inputs that autograd saves for another reason."""
        if self._offered is not None and x.is_contiguous() and x.storage_offset() == 0:
            again = partial(_again, compute, [each.detach() for each in inputs])
            self._offered[x.untyped_storage()._cdata] = x, again
        return x

    @contextmanager
    def block(self) -> Iterator[None]:
        """Drop what is offered inside the context."""
        if not self.is_on or not torch.is_grad_enabled():
            yield
            return
        self._offered = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._offered = None

    def _pack(self, x: Tensor) -> Tensor | _Dropped:
        assert self._offered is not None
        found = self._offered.get(x.untyped_storage()._cdata)
        if found is None or x.dtype != found[0].dtype:
            return x
        return _Dropped(found[1], x.size(), x.stride(), x.storage_offset())


def _unpack(saved: Tensor | _Dropped) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.compute().as_strided(saved.size, saved.stride, saved.offset)


def _again(compute: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():  # as in the forward, for the same bits
        return compute(*[each.detach().requires_grad_() for each in inputs]).detach()
