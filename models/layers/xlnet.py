"""Attention with relative positions and two streams.

XLNet (Yang et al. 2019, sections 2.3 and 2.4) with the positions of Transformer-XL (Dai et al. 2019, section 3.3). A
sample has a row for each token, the content stream, and in training after them a row for each predicted token, the
query stream, which has the token's position but not the token. The score of row i and token j, at distance d = position
of i - j, is

    (q_i + u) k_j + (q_i + v) W_r R_d        R_d: sines, then cosines, of d / 10000^(2m / hidden)

All rows use the same weights; keys and values come from the content stream. Tokens are predicted in an order; the other
tokens are known from the start. A content row attends to its own token, the known tokens and those predicted before it;
a query row to the same tokens without its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.attention import AttentionDropout
from trimaran.kernels.attention.options import Sizes
from trimaran.kernels.attention.reference import attention_keep_mask
from trimaran.models.cache.key_value import ForwardContext
from trimaran.models.config import TransformerConfig
from trimaran.models.init import init_spec
from trimaran.models.layers.attention import Attention
from trimaran.models.parallel.parameter import LayerContext, new_parameter
from trimaran.models.recompute import recompute


class RelativeAttention(Attention):
    """Attention with relative positions, with whole score matrices in memory; W_r, u and v are cut over tp by heads."""

    def __init__(self, config: TransformerConfig, context: LayerContext, *, index: int, seed: int) -> None:
        super().__init__(config, context, index=index, seed=seed)
        width, hidden = config.num_heads * config.head_dim, config.hidden_size
        self.position = new_parameter(
            (width, hidden), context, dim=0, init_spec=init_spec(config, "query"), unit=config.head_dim
        )
        self.content_bias = new_parameter((width,), context, dim=0, init="zeros", decay=False, unit=config.head_dim)
        self.position_bias = new_parameter((width,), context, dim=0, init="zeros", decay=False, unit=config.head_dim)

    def heads(self, q: Tensor, kv: Tensor, forward_context: ForwardContext) -> Tensor:
        """Return the output of this rank's heads [batch, rows, local heads * head_dim]; see `Attention.heads`.

        Args:
            q, kv: [batch, rows, ...], rows = seq, or seq + predicted where `forward_context` has targets.
        """
        if self.droppable.is_on and torch.is_grad_enabled():
            return recompute(lambda inputs: (self._heads(inputs[0], inputs[1], forward_context),), q, kv)[0]
        return self._heads(q, kv, forward_context)

    def _heads(self, q: Tensor, kv: Tensor, forward_context: ForwardContext) -> Tensor:
        seq = q.shape[1] - (0 if forward_context.targets is None else forward_context.targets.shape[1])
        k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in kv[:, :seq].chunk(2, dim=-1))
        by_content, by_position = (
            (q + bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for bias in (self.content_bias, self.position_bias)
        )
        distances = F.linear(_sinusoids(seq, self.position), self.position).unflatten(-1, (-1, self.head_dim))
        rows = _row_positions(q, seq, forward_context.targets)
        columns = rows.unsqueeze(-1) - torch.arange(seq, device=q.device) + (seq - 1)
        position_scores = by_position @ distances.permute(1, 2, 0)  # [batch, heads, rows, 2 seq - 1]
        scores = by_content @ k.transpose(-1, -2) + position_scores.gather(
            -1, columns.unsqueeze(1).expand(-1, k.shape[1], -1, -1)
        )
        scores = scores * self.options.scale_for(self.head_dim)
        scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        if forward_context.targets is not None:
            scores = scores.masked_fill(~_visible(forward_context.targets, seq).unsqueeze(1), -torch.inf)
        probabilities = scores.softmax(-1)
        if self.training and self.dropout_rate > 0.0:
            dropout = AttentionDropout(
                self.dropout_rate, self.dropout_key, forward_context.first_sample, self.first_head, self.num_heads
            )
            sizes = Sizes(len(q), q.shape[1], seq, self.local_heads, self.local_heads, self.head_dim)
            probabilities = (
                probabilities * attention_keep_mask(dropout, sizes, None, q.device) / (1.0 - self.dropout_rate)
            )
        out: Tensor = probabilities.to(v.dtype) @ v
        return out.transpose(1, 2).flatten(2)


def _sinusoids(seq: int, like: Tensor) -> Tensor:
    """Return R_d for the distances -(seq - 1) ... seq - 1 [2 * seq - 1, hidden], computed in float64."""
    hidden = like.shape[1]
    frequencies = 10000.0 ** (-torch.arange(0, hidden, 2, dtype=torch.float64, device=like.device) / hidden)
    angles = torch.arange(1 - seq, seq, dtype=torch.float64, device=like.device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :hidden].to(like.dtype)


def _row_positions(q: Tensor, seq: int, targets: Tensor | None) -> Tensor:
    """Return each row's position [batch, rows] int64."""
    positions = torch.arange(seq, device=q.device).expand(len(q), seq)
    return positions if targets is None else torch.cat((positions, targets), dim=1)


def _visible(targets: Tensor, seq: int) -> Tensor:
    """Return which tokens each row attends to [batch, seq + predicted, seq] bool."""
    batch, predicted = targets.shape
    turns = torch.arange(predicted, device=targets.device).expand(batch, predicted)
    order = torch.full((batch, seq), -1, device=targets.device).scatter(1, targets, turns)  # -1: known from the start
    turn_of_row = torch.cat((order.clamp(min=0), turns), dim=1)
    itself = torch.eye(seq + predicted, seq, dtype=torch.bool, device=targets.device)
    return (order.unsqueeze(1) < turn_of_row.unsqueeze(-1)) | itself
