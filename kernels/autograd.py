"""Calls an autograd function, and skips autograd where gradients are off."""

from typing import Any

import torch


class _NoContext:
    """The `ctx` of a forward pass without a backward pass: it keeps nothing."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)`; where gradients are off, call the forward pass directly.

    The bookkeeping of torch's apply takes longer than a small operation.
    """
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)
