"""Adds up a weight's gradient: in the optimizer's buffer where there is one, else in a tensor for autograd."""

import torch
from torch import Tensor

from trimaran.models.parallel.parameter import info_of


class GradAccumulator:
    """The gradient that one backward pass through one layer gives to one weight.

    Where the optimizer has set `ParameterInfo.main_grad`, the gradient is added to that buffer and `finish` calls
    `on_grad`. Elsewhere it is a tensor of the weight's shape and dtype, which `finish` returns for autograd.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._info = weight, info_of(weight)
        self._total = self._info.main_grad

    def total(self) -> Tensor:
        """Return the tensor to add to, of the weight's shape: `main_grad`, or zeros at first."""
        if self._total is None:
            self._total = torch.zeros_like(self._weight)
        return self._total

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b, whose elements in order are those of the weight."""
        if self._total is None:
            self._total = (a @ b).view_as(self._weight)
        else:
            add_product_(self._total.view(a.shape[0], b.shape[1]), a, b)

    def finish(self) -> Tensor | None:
        """Return the gradient for autograd; None where it is in `main_grad`, after calling `on_grad`."""
        if self._info.main_grad is None:
            return self.total()
        if self._info.on_grad is not None:
            self._info.on_grad()
        return None


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, within the matrix product itself where the dtypes agree: no temporary, no second pass."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
