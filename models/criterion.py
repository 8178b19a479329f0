"""The loss of the last stage where it is not the mean of the tokens' cross entropies: preferences, rewards, policies.

A criterion reads log-probabilities of single tokens, or scores of positions, and makes a scalar of them by plain
torch. As `head_loss` does, the head runs its backward pass within the forward: what the head's parameters get is added
at once, and only the gradient of its input is kept. So a pipeline schedule, ZeRO 3 and a backward in two parts treat
both alike (see boundary.py).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.backward import backward
from trimaran.models.parallel.gradient import GradAccumulator
from trimaran.models.parallel.parameter import info_of


class Head(Protocol):
    """What a criterion reads of the last stage. Every call is collective over tp."""

    def token_log_probs(self, hidden: Tensor, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Return the log-probability of each label [batch, seq], 0 where there is none."""
        ...

    def scores(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the score head's number at each of the positions `rows` of the flattened batch * seq [rows]."""
        ...

    def token_entropies(self, hidden: Tensor, batch: Microbatch, temperature: float = 1.0) -> Tensor:
        """Return the entropy of what is predicted at each label [batch, seq], 0 where there is none, no gradient."""
        ...


class Criterion(Protocol):
    """Makes the loss of a microbatch, and counts what a step tells beside it.

    Attributes:
        names: of the statistics.
    """

    @property
    def names(self) -> Sequence[str]: ...

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the losses of the microbatch's units (tokens, pairs, ...) [scalar].

        Args:
            hidden: [batch, local seq, hidden], of the last stage's layers.
        The same on all tp ranks. Called with gradients on in training, off in evaluation.
        """
        ...

    def take_sums(self) -> Tensor:
        """Return the sum of each statistic over the losses since the last call [number of names], float64.

        Zeros on a rank without the last stage.
        """
        ...


class _WithGradients(torch.autograd.Function):
    """The forward pass computes the gradients for an output gradient of `loss_weight`; the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        compute: Callable[[Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        loss_weight: float,
    ) -> Tensor:
        x = hidden.detach().requires_grad_()
        with torch.enable_grad():
            loss = compute(x)
            if loss.requires_grad:  # a microbatch may have nothing to learn
                backward([loss], [torch.full_like(loss, loss_weight)])
        for parameter in parameters:
            if parameter.grad is not None and info_of(parameter).main_grad is not None:
                GradAccumulator(parameter).total().add_(parameter.grad)
                parameter.grad = None
        ctx.loss_weight = loss_weight
        ctx.save_for_backward(torch.zeros_like(x) if x.grad is None else x.grad)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        factor = grads[0] / ctx.loss_weight  # 1, but for a scale that the caller adds
        return (dx.to(factor.dtype) * factor).to(dx.dtype), None, None, None


def loss_with_gradients(
    hidden: Tensor, compute: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], loss_weight: float
) -> Tensor:
    """Return `compute(hidden)` [scalar], with the gradients of `parameters` for the weight `loss_weight` added already.

    Args:
        compute: the head and the criterion.
        parameters: of the head.
        loss_weight: not 0; the gradient that the backward pass will get.
    """
    if not torch.is_grad_enabled():
        return compute(hidden)
    return _WithGradients.apply(  # type: ignore[no-untyped-call, no-any-return]
        hidden, compute, parameters, loss_weight
    )
