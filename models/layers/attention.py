"""The attention layer: grouped-query heads cut over tp, positions, key-value cache."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.kernels.attention import AttentionDropout, AttentionOptions, alibi_slopes
from trimaran.kernels.random import stream_key
from trimaran.models.cache.key_value import ForwardContext, KeyValueCache, RotaryTables
from trimaran.models.config import TransformerConfig
from trimaran.models.init import init_spec
from trimaran.models.parallel.collectives import sum_over_group
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_linear
from trimaran.models.parallel.parameter import LayerContext, new_parameter
from trimaran.models.recompute import recompute


class QueryKeyNorm(nn.Module):
    """RMSNorm of queries or keys before the rotation: over each head (Qwen 3), or over all heads together (OLMo 2).

    Args:
        width: elements of all heads, on all tp ranks.
        is_cut: whether this rank holds only its part of the heads.
        unit: a part's width is a multiple of it.
    """

    def __init__(
        self, config: TransformerConfig, context: LayerContext, *, width: int, is_cut: bool, unit: int
    ) -> None:
        super().__init__()
        self.over_heads, self.eps, self.kernels = config.query_key_norm == "width", config.norm_eps, context.kernels
        self.width, self.group = width, context.tp if is_cut and self.over_heads and context.tp.size > 1 else None
        shape = (width if self.over_heads else config.head_dim,)
        # Each tp rank applies a replicated scale to its own heads only, so its gradient is a part of the sum over tp.
        dim = 0 if self.group is not None else None
        self.weight = new_parameter(
            shape, context, dim=dim, init="ones", decay=False, needs_tp_grad_reduce=dim is None, unit=unit
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [batch, seq, local heads, head_dim]. Collective over tp where it spans all heads."""
        if not self.over_heads:
            return self.kernels.rms_norm(x, self.weight, self.eps)
        rows = x.flatten(2)
        if self.group is None:
            return self.kernels.rms_norm(rows, self.weight, self.eps).view_as(x)
        wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        squares = sum_over_group(wide.square().sum(-1, keepdim=True), self.group)
        normed: Tensor = (wide * (squares / self.width + self.eps).rsqrt()).to(x.dtype) * self.weight
        return normed.view_as(x)


class Attention(nn.Module):
    """Self-attention; this tp rank computes heads / tp query heads and kv_heads / tp key-value heads.

    A key-value head and the query heads that read it stay on one rank. Where tp does not divide the key-value heads,
    the last rank has fewer and is padded with heads of zeros, whose gradients are zero. Where there are not enough
    key-value heads for that, every rank holds them all and computes with those that its queries read; the gradient is
    then a part of the sum over tp. The query heads are then cut by themselves, and padding among them computes nothing.
    """

    def __init__(self, config: TransformerConfig, context: LayerContext, *, index: int, seed: int) -> None:
        super().__init__()
        tp, site = context.tp, f"layers.{index}.attention"
        self.index, self.head_dim, self.num_heads = index, config.head_dim, config.num_heads
        cuts_kv = config.cuts_kv_heads(tp.size)
        group = config.num_heads // config.num_kv_heads
        self.local_heads = config.heads_per_rank(tp.size)
        kv_unit, unit = config.head_dim, config.head_dim * (group if cuts_kv else 1)
        self.first_head = self.local_heads * tp.rank
        self.real_heads = self.local_heads if cuts_kv else min(self.local_heads, config.num_heads - self.first_head)
        self.dropout_rate, self.dropout_key = config.attention_dropout, stream_key(seed, f"{site}.probabilities")
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        # Key-value head -> number of this rank's query heads that read it.
        read = Counter(head // group for head in range(self.first_head, self.first_head + self.real_heads))
        self.kv_heads = None if cuts_kv else read
        self.q = ColumnParallelLinear(
            config.hidden_size, width, context, bias=config.qkv_bias, init_spec=init_spec(config, "query"), unit=unit
        )
        into_kv = init_spec(config, "key", "value")
        self.kv = ColumnParallelLinear(
            config.hidden_size,
            kv_width,
            context,
            bias=config.qkv_bias,
            init_spec=into_kv,
            parts=2,
            is_whole=not cuts_kv,
            unit=kv_unit,
        )
        has_norms = config.query_key_norm != "none"
        self.q_norm = QueryKeyNorm(config, context, width=width, is_cut=True, unit=unit) if has_norms else None
        self.k_norm = QueryKeyNorm(config, context, width=kv_width, is_cut=cuts_kv, unit=kv_unit) if has_norms else None
        into_out = init_spec(config, "attention_output")
        self.out = RowParallelLinear(
            width, config.hidden_size, context, bias=config.out_bias, init_spec=into_out, unit=unit
        )
        self.kernels, self.interleaved = context.kernels, config.rotary_interleaved
        self.droppable = context.droppable
        self.options = AttentionOptions(
            causal=config.is_causal,
            window=config.window_of(index),
            softcap=config.attention_softcap,
            scale=config.attention_scale,
            deterministic=context.deterministic,
        )
        self.slopes: Tensor | None = None
        if config.position == "alibi":
            slopes = alibi_slopes(config.num_heads)[self.first_head : self.first_head + self.real_heads]
            slopes += [0.0] * (self.real_heads - len(slopes))
            self.slopes = torch.tensor(slopes, dtype=torch.float32, device=context.device) * config.alibi_scale

    def forward(self, x: Tensor, forward_context: ForwardContext) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape."""
        sample = forward_context.first_sample
        q, kv = column_linear(x, (self.q, self.kv), sample)
        out: Tensor = self.out(self.heads(q, kv, forward_context), sample)
        return out

    def heads(self, q: Tensor, kv: Tensor, forward_context: ForwardContext) -> Tensor:
        """Return the output of this rank's heads [batch, seq, local heads * head_dim], the input of `out`.

        Args:
            q: output of the projection `q` [batch, seq, local heads * head_dim].
            kv: output of the projection `kv` [batch, seq, 2 * kv heads * head_dim].
        """
        batch, seq_len = q.shape[:2]
        q = q.view(batch, seq_len, -1, self.head_dim)
        k, v = kv.view(batch, seq_len, 2, -1, self.head_dim).unbind(2)
        unnormed = q, k
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kv_heads is not None:
            q = q[:, :, : self.real_heads]
            k, v = (_read_heads(part, self.kv_heads) for part in (k, v))
        if forward_context.tables is not None and forward_context.cache is not None:
            # For few tokens one rotation of both is faster.
            turned = self.kernels.rotary(torch.cat((q, k), dim=2), *forward_context.tables, self.interleaved)
            q, k = turned.split((q.shape[2], k.shape[2]), dim=2)
        elif forward_context.tables is not None:
            q, k = (
                self._turned(part, before, forward_context.tables, norm)
                for part, before, norm in ((q, unnormed[0], self.q_norm), (k, unnormed[1], self.k_norm))
            )
        if forward_context.cache is not None:
            return self._padded(self._cached(q, k, v, forward_context.cache))
        if forward_context.packed is not None:
            return self._padded(
                forward_context.packed.attend(self.index, q, k, v, self.kernels, self.options, self.slopes)
            )
        dropout = None
        if self.training and self.dropout_rate > 0.0:
            dropout = AttentionDropout(
                self.dropout_rate, self.dropout_key, forward_context.first_sample, self.first_head, self.num_heads
            )
        attend = partial(
            self.kernels.attention,
            options=self.options,
            slopes=self.slopes,
            documents=forward_context.documents,
            dropout=dropout,
        )
        if self.droppable.is_on and torch.is_grad_enabled() and self.kernels.keeps_scores(self.options, dropout):
            return self._padded(recompute(lambda inputs: (attend(*inputs),), q, k, v)[0])
        return self._padded(attend(q, k, v))

    def _turned(self, part: Tensor, unnormed: Tensor, tables: RotaryTables, norm: "QueryKeyNorm | None") -> Tensor:
        """Return queries or keys, rotated."""
        turn = partial(self.kernels.rotary, cos=tables[0], sin=tables[1], interleaved=self.interleaved)
        turned = turn(part)
        # Only the backward pass of a norm keeps what they are computed from.
        if norm is None or norm.group is not None or self.kv_heads is not None:
            return turned
        return self.droppable.offer(turned, lambda x: turn(norm(x)), unnormed)

    def _padded(self, out: Tensor) -> Tensor:
        """Return the heads' output [batch, seq, real heads, head_dim] as [batch, seq, local heads * head_dim]."""
        missing = (self.local_heads - self.real_heads) * self.head_dim
        return F.pad(out.flatten(2), (0, missing)) if missing else out.flatten(2)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache) -> Tensor:
        """Append k and v to the cache; return the attention of q [batch, new, local heads, head_dim] over it."""
        keys, values = cache.of_layer(self.index, k.shape[2])
        self.kernels.append_to_cache_(keys, values, k, v, cache.lengths)
        longest = max(cache.host_lengths)
        if longest == min(cache.host_lengths) == q.shape[1]:  # whole sequences: no need to read the cache
            return self.kernels.attention(q, k, v, self.options, slopes=self.slopes)
        return self.kernels.decode_attention(
            q,
            keys,
            values,
            cache.lengths,
            window=self.options.window,
            softcap=self.options.softcap,
            alibi_slopes=self.slopes,
            scale=self.options.scale,
            max_length=longest,
        )


def _read_heads(part: Tensor, read: Mapping[int, int]) -> Tensor:
    """Return of all heads of keys or values [batch, seq, kv heads, head_dim] the one that is read, or a copy a reader.

    Not `index_select`, whose gradient is summed in another order every time on a GPU.
    """
    if len(read) == 1:
        return part.narrow(2, next(iter(read)), 1)
    return torch.cat([part.narrow(2, head, 1).expand(-1, -1, count, -1) for head, count in read.items()], dim=2)
