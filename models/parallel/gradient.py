"""Adds up a weight's gradient: in the optimizer's buffer where there is one, else in a tensor for autograd."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimaran.models.parallel.parameter import info_of


class GradAccumulator:
    """The gradient that one backward pass through one layer gives to one weight.

    Where the optimizer has set `ParameterInfo.main_grad`, the gradient is added to that buffer. Elsewhere it is a
    tensor of the weight's shape and dtype, which `finish` returns for autograd.
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
        """Return the gradient for autograd; None where it is in `main_grad`."""
        return self.total() if self._info.main_grad is None else None


def weight_gradient(weight: Tensor, compute: Callable[[GradAccumulator], None]) -> Tensor | None:
    """Return what `weight_gradients` returns for one weight."""
    return weight_gradients([weight], lambda gradients: compute(gradients[0]))[0]


def weight_gradients(
    weights: Sequence[Tensor], compute: Callable[[Sequence[GradAccumulator]], None]
) -> Sequence[Tensor | None]:
    """Return what `GradAccumulator.finish` returns after `compute`; None each where the queue takes `compute`.

    Whoever runs the queue later has the gradients where they would be now: in `main_grad`, or in `weight.grad`.
    """
    later = info_of(weights[0]).queue.later
    if later is None:
        return _computed(weights, compute)

    def run() -> None:
        for weight, found in zip(weights, _computed(weights, compute), strict=True):
            if found is not None:
                weight.grad = found if weight.grad is None else weight.grad.add_(found)

    later.append(run)
    return [None] * len(weights)


def _computed(
    weights: Sequence[Tensor], compute: Callable[[Sequence[GradAccumulator]], None]
) -> Sequence[Tensor | None]:
    gradients = [GradAccumulator(weight) for weight in weights]
    compute(gradients)
    return [gradient.finish() for gradient in gradients]


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, factor: float = 1.0, overwrite: bool = False) -> None:
    """Add factor * a @ b to `total`, or write it there, within the product: no temporary, no second pass over memory.

    total: float32 or wider, also where a and b are narrower: their product is never rounded to their dtype.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if overwrite else 1, alpha=factor, out=total)
    else:
        torch.ops.trimaran.add_product(total, a, b, factor, overwrite)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, overwrite: bool) -> None:
    beta = 0 if overwrite else 1
    if total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=factor, out=total)
    else:  # torch has no such product on a CPU
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=factor, out=total)


# An operator is opaque to a compiler: inductor would round a product of bfloat16 matrices to bfloat16 and ignore
# out_dtype. torch.compiler.disable and torch.library.custom_op would import torch._dynamo, a third of a rank's start-up
# time.
_OPERATORS = torch.library.Library("trimaran", "FRAGMENT")
_OPERATORS.define("add_product(Tensor(a!) total, Tensor a, Tensor b, float factor, bool overwrite) -> ()")
_OPERATORS.impl("add_product", _add_product, "CompositeExplicitAutograd")
_OPERATORS.impl("add_product", lambda total, a, b, factor, overwrite: None, "Meta")
