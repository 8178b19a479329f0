"""The residual stream: dropout of what is added to it, delayed addition, and the norms that read it."""

import torch
from torch import Tensor, nn

from trimaran.kernels.dropout import DropoutPosition
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext, new_parameter


class Dropout(nn.Module):
    """Dropout of a residual branch; its mask depends only on (seed, site, sample, position)."""

    def __init__(self, rate: float, context: LayerContext, *, site: str, seed: int) -> None:
        super().__init__()
        self.rate, self.site, self.seed, self.context = rate, site, seed, context

    @property
    def is_on(self) -> bool:
        """Whether dropout applies: in training mode, with a rate above 0."""
        return self.training and self.rate > 0.0

    def forward(self, x: Tensor, first_sample: int) -> Tensor:
        """Return x [batch, local seq, hidden] with elements dropped in training mode."""
        return self.context.kernels.dropout(x, self.rate, **self._where(x, first_sample)) if self.is_on else x

    def add(self, x: Tensor, residual: Tensor, first_sample: int) -> Tensor:
        """Return residual + dropout(x)."""
        return (
            self.context.kernels.dropout_add(x, residual, self.rate, **self._where(x, first_sample))
            if self.is_on
            else residual + x
        )

    def _where(self, x: Tensor, first_sample: int) -> DropoutPosition:
        parts = self.context.tp.size if self.context.sequence_parallel else 1
        return {
            "seed": self.seed,
            "site": self.site,
            "first_sample": first_sample,
            "first_position": x.shape[1] * (self.context.tp.rank if parts > 1 else 0),
            "seq_len": x.shape[1] * parts,
        }


PendingResidual = tuple[Tensor, Dropout]
"""A sub-layer's output [batch, local seq, hidden] and its dropout, not yet added to the residual stream.

The next reader of the stream adds it: usually a norm, which adds and normalizes in one pass over memory.
"""


def add_residual(x: Tensor, pending: PendingResidual | None, first_sample: int) -> Tensor:
    """Return the residual stream with `pending` added."""
    return x if pending is None else pending[1].add(pending[0], x, first_sample)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the hidden dim, as the config says; every tp rank holds all of it."""

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        shape, partial = (config.hidden_size,), context.sequence_parallel
        self.eps, self.is_rms, self.kernels = config.norm_eps, config.norm == "rmsnorm", context.kernels
        self.droppable = context.droppable
        if config.norm_weight:
            self.weight: Tensor = new_parameter(shape, context, init="ones", decay=False, needs_tp_grad_reduce=partial)
        else:
            self.register_buffer(
                "weight", torch.ones(shape, dtype=context.dtype, device=context.device), persistent=False
            )
        has_bias = config.norm_bias and not self.is_rms
        self.bias = (
            new_parameter(shape, context, init="zeros", decay=False, needs_tp_grad_reduce=partial) if has_bias else None
        )

    def forward(self, x: Tensor, pending: PendingResidual | None, first_sample: int) -> tuple[Tensor, Tensor]:
        """Return (the residual stream x with `pending` added, its norm), both of x's shape."""
        if pending is None or pending[1].is_on:
            stream = add_residual(x, pending, first_sample)
            normed = self._norm(stream)
        elif self.is_rms:
            stream, normed = self.kernels.add_rms_norm(pending[0], x, self.weight, self.eps)
        else:
            stream, normed = self.kernels.add_layer_norm(pending[0], x, self.weight, self.bias, self.eps)
        return stream, self.droppable.offer(normed, self._norm, stream)

    def _norm(self, x: Tensor) -> Tensor:
        if self.is_rms:
            return self.kernels.rms_norm(x, self.weight, self.eps)
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)
