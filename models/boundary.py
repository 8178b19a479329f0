"""Boundaries of blocks: a listener learns when each block of a stage begins and ends, in both passes.

A block is the embedding, a transformer layer, the final norm (with what else precedes the head) or the head. Whoever
gathers parameters before they are used, or reduces gradients once they are complete, works by whole blocks. So no
callback runs inside a layer, where a compiler could not trace it.

                         F           B or I              B or W
    reads parameters     each block  all but the head    -
    adds to main_grad    the head    -                   all but the head
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimaran.models.parallel.backward import backward
from trimaran.models.parallel.gradient import GradAccumulator
from trimaran.models.parallel.parameter import WeightGradientQueue

EMBEDDING, FINAL, HEAD = "embedding", "final", "head"
"""Names of the blocks that are no transformer layers; those are called `layers.7`."""


class BlockListener(Protocol):
    """What is told of every block, by name, on this rank."""

    def before_forward(self, block: str) -> None:
        """Its parameters are read next."""

    def after_forward(self, block: str) -> None:
        """Its parameters are not read any more in this forward."""

    def before_backward(self, block: str) -> None:
        """Its parameters are read next, by the gradient of its input."""

    def after_backward(self, block: str) -> None:
        """Its parameters are not read any more in this backward."""

    def before_gradients(self, block: str) -> None:
        """Gradients are added to its parameters' `main_grad` next."""

    def after_gradients(self, block: str) -> None:
        """Its parameters' `main_grad` have this microbatch's whole gradient."""


def backward_blocks(blocks: Iterable[str]) -> list[str]:
    """Return the blocks that a backward pass goes through, in its order: all but the head, which the forward ends."""
    return [block for block in blocks if block != HEAD][::-1]


@dataclass(eq=False)
class Boundary:
    """Calls the listener of one stage.

    Args:
        parameters: block -> its parameters, in the order of the network.
        queue: where products of weight gradients go that are computed later; the calls about gradients then go there
            too, between them.
        listener: None: nothing is called, and autograd leaves gradients in `.grad`.
        takes_gradients: whether what autograd leaves in `.grad` is moved to `main_grad` at the end of each block.
    """

    parameters: Mapping[str, Sequence[nn.Parameter]]
    queue: WeightGradientQueue
    listener: BlockListener | None = None
    takes_gradients: bool = True
    _current: str = ""  # block of the backward pass that runs

    def forward(self, block: str) -> "_Forward":
        """Return the context in which the block's forward runs."""
        return _Forward(self.listener, block, block == HEAD and torch.is_grad_enabled())

    def cross(self, after: str, before: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return `tensors`, which block `after` (in the order of the backward pass) hands on to block `before`."""
        if self.listener is None or not torch.is_grad_enabled():
            return tensors
        return _Cross.apply(  # type: ignore[no-untyped-call, no-any-return]
            partial(self._cross, after, before), *tensors
        )

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """Run the backward pass of the stage's `output` from its gradient `grad`."""
        if self.listener is None:
            backward([output], [grad])
            return
        first, *others = backward_blocks(self.parameters)
        self._begin(first)
        backward([output], [grad])
        # Autograd stops before blocks that no gradient is needed for: those that precede all that learns.
        for block in others[others.index(self._current) + 1 if self._current in others else 0 :]:
            self._cross(self._current, block)
        self._end(self._current)

    def _cross(self, after: str, before: str) -> None:
        self._end(after)
        self._begin(before)

    def _begin(self, block: str) -> None:
        assert self.listener is not None
        self._current = block
        self.listener.before_backward(block)
        self._now_or_later(partial(self.listener.before_gradients, block))

    def _end(self, block: str) -> None:
        """Take the gradients that autograd has left in `.grad`: those of norms and biases."""
        assert self.listener is not None
        parameters = self.parameters[block] if self.takes_gradients else ()
        found = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in found:
            parameter.grad = None
        if found:
            self._now_or_later(partial(_add, found))
        self.listener.after_backward(block)
        self._now_or_later(partial(self.listener.after_gradients, block))

    def _now_or_later(self, call: Callable[[], None]) -> None:
        if self.queue.later is None:
            call()
        else:
            self.queue.later.append(call)


def _add(gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    for parameter, grad in gradients:
        GradAccumulator(parameter).total().add_(grad)


class _Forward:
    """The time of a block's forward. (A generator's context takes as long as a small operation in generation.)"""

    __slots__ = ("_adds", "_block", "_listener")

    def __init__(self, listener: BlockListener | None, block: str, adds: bool) -> None:
        self._listener, self._block, self._adds = listener, block, adds

    def __enter__(self) -> None:
        if self._listener is not None:
            self._listener.before_forward(self._block)
            if self._adds:
                self._listener.before_gradients(self._block)

    def __exit__(self, *exception: object) -> None:
        if self._listener is not None and exception[0] is None:
            if self._adds:
                self._listener.after_gradients(self._block)
            self._listener.after_forward(self._block)


class _Cross(torch.autograd.Function):
    """The identity. Its backward pass runs when every gradient of the later block is computed.

    Autograd runs what was recorded last first, and gradients of parameters at once.
    """

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple([tensor.view_as(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *grads
