"""Calling an autograd function where perhaps no gradient is wanted."""

from typing import Any

import torch


class _NoContext:
    """Stands for the context of a forward pass that no backward pass follows: it keeps nothing longer than the pass."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return what `function.apply` returns; where gradients are off, by its forward pass alone: what apply does besides takes longer than a small operation."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)
