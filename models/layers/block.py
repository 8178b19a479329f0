"""One transformer layer: attention and feed-forward on the residual stream.

The config places the norms: before the branches (Radford et al., GPT-2, 2019; Touvron et al., LLaMA, 2023), after the
sums (Vaswani et al. 2017) or elsewhere. Shapes: `batch` is the number of sequences in a microbatch, `local seq` is seq,
or seq / tp with sequence parallelism.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from trimaran.models.cache.key_value import ForwardContext
from trimaran.models.config import TransformerConfig
from trimaran.models.layers.attention import Attention
from trimaran.models.layers.experts import ExpertMLP
from trimaran.models.layers.mlp import MLP
from trimaran.models.layers.residual import Dropout, Norm, PendingResidual, add_residual
from trimaran.models.layers.xlnet import RelativeAttention
from trimaran.models.parallel.linear import column_linear, row_linear
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.recompute import recompute


class Block(nn.Module):
    """One transformer layer; `index` is its global number."""

    def __init__(self, config: TransformerConfig, context: LayerContext, *, index: int, seed: int) -> None:
        super().__init__()
        site, every = f"layers.{index}", context.recompute
        hidden_dropout = config.hidden_dropout_of(index)
        self.is_recomputed, self.droppable = every > 0 and index % every == 0, context.droppable
        self.kind, self.residual_scale = config.block, config.residual_scale
        self.is_post_norm = config.norm_position == "post"
        has_norm = config.norm_position in ("pre", "sandwich")
        has_post_norm = config.norm_position in ("post", "branch", "sandwich")

        def norm(is_there: bool) -> Norm | None:
            return Norm(config, context) if is_there else None

        self.attention_norm = norm(has_norm)
        attention = RelativeAttention if config.position == "relative" else Attention
        self.attention = attention(config, context, index=index, seed=seed)
        self.attention_dropout = Dropout(hidden_dropout, context, site=f"{site}.attention.output", seed=seed)
        self.attention_post_norm = norm(has_post_norm)
        self.mlp_norm = norm(has_norm and config.block != "parallel_one_norm")
        self.mlp = ExpertMLP(config, context) if config.num_experts else MLP(config, context)
        self.mlp_dropout = Dropout(hidden_dropout, context, site=f"{site}.mlp.output", seed=seed)
        self.mlp_post_norm = norm(has_post_norm)

    def forward(
        self, x: Tensor, pending: PendingResidual | None, forward_context: ForwardContext
    ) -> tuple[Tensor, PendingResidual | None]:
        """Return the residual stream [batch, local seq, hidden] and the last residual, not added yet.

        Args:
            x, pending: those two from the layer before.
        """
        if self.is_recomputed and self.training and torch.is_grad_enabled():
            return self._recomputed(x, pending, forward_context)
        with self.droppable.block():
            return self._compute(x, pending, forward_context)

    def _recomputed(
        self, x: Tensor, pending: PendingResidual | None, forward_context: ForwardContext
    ) -> tuple[Tensor, PendingResidual | None]:
        """Return what `_compute` returns, with its activations dropped and computed again in the backward pass."""
        dropouts: list[Dropout] = []  # of the residual that is not added yet
        is_first = True

        def compute(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            nonlocal is_first
            counting = nullcontext() if is_first or not isinstance(self.mlp, ExpertMLP) else self.mlp.without_counting()
            is_first = False
            before = None if pending is None else (inputs[1], pending[1])
            with counting:
                stream, after = self._compute(inputs[0], before, forward_context)
            dropouts[:] = [] if after is None else [after[1]]
            return (stream,) if after is None else (stream, after[0])

        stream, *rest = recompute(compute, x, *([] if pending is None else [pending[0]]))
        return stream, (rest[0], dropouts[0]) if rest else None

    def _compute(
        self, x: Tensor, pending: PendingResidual | None, forward_context: ForwardContext
    ) -> tuple[Tensor, PendingResidual | None]:
        sample = forward_context.first_sample
        if self.kind != "sequential":
            return self._parallel(x, pending, forward_context)
        x, normed = self._read(self.attention_norm, x, pending, sample)
        x, pending = self._add(
            x, self.attention(normed, forward_context), self.attention_dropout, self.attention_post_norm, sample
        )
        x, normed = self._read(self.mlp_norm, x, pending, sample)
        out = (
            self.mlp(normed, forward_context.sequence_weight)
            if isinstance(self.mlp, ExpertMLP)
            else self.mlp(normed, sample)
        )
        return self._add(x, out, self.mlp_dropout, self.mlp_post_norm, sample)

    @staticmethod
    def _read(
        norm: Norm | None, x: Tensor, pending: PendingResidual | None, first_sample: int
    ) -> tuple[Tensor, Tensor]:
        """Return the stream with `pending` added, and the input of the next sub-layer."""
        if norm is not None:
            stream, normed = norm(x, pending, first_sample)
            return stream, normed
        x = add_residual(x, pending, first_sample)
        return x, x

    def _add(
        self, x: Tensor, out: Tensor, dropout: Dropout, post_norm: Norm | None, first_sample: int
    ) -> tuple[Tensor, PendingResidual | None]:
        """Return the stream, and the sub-layer's residual, not added yet (None where the norm has added it)."""
        if post_norm is None:
            return x, (out, dropout)
        if self.is_post_norm:
            x = x if self.residual_scale == 1.0 else x * self.residual_scale
            return post_norm(x, (out, dropout), first_sample)[1], None
        return x, (post_norm(out, None, first_sample)[1], dropout)

    def _parallel(
        self, x: Tensor, pending: PendingResidual | None, forward_context: ForwardContext
    ) -> tuple[Tensor, PendingResidual]:
        """Run attention and feed-forward side by side (Wang and Komatsuzaki, GPT-J, 2021), with one collective."""
        sample = forward_context.first_sample
        x, normed = self._read(self.attention_norm, x, pending, sample)
        attention, mlp = self.attention, self.mlp
        assert isinstance(mlp, MLP), "a parallel block has no experts"
        if self.mlp_norm is None:
            q, kv, up = column_linear(normed, (attention.q, attention.kv, mlp.up), sample)
        else:
            q, kv = column_linear(normed, (attention.q, attention.kv), sample)
            up = mlp.up(self.mlp_norm(x, None, sample)[1], sample)
        outputs = [(attention.heads(q, kv, forward_context), attention.out), (mlp.activation(up), mlp.down)]
        out = row_linear(outputs, sample)
        return x, (out, self.mlp_dropout)
