"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) with a causal mask and grouped-query heads (Ainslie et al. 2023): the torch twin.

attention(q, k, v) = dropout(softmax(q k^T / sqrt(head_dim) + causal mask)) v
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.random import Key, keep_mask


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, dropout_rate: float = 0.0) -> Tensor:
    """Return causal attention [batch, seq, heads, head_dim].

    Args:
        q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim], heads a multiple of kv_heads: query head i reads
            kv head i // (heads / kv_heads).
        keep: [batch, heads, seq, seq] bool from `attention_keep_mask`, or None for no dropout of the probabilities.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if keep is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        # Dropout by counter needs the probabilities themselves: torch's own dropout would draw a mask that depends on the layout.
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = (probabilities * keep / (1.0 - dropout_rate)) @ v
    return out.transpose(1, 2)


def attention_keep_mask(
    key: Key,
    first_sample: int,
    batch: int,
    first_head: int,
    num_heads: int,
    total_heads: int,
    seq_len: int,
    rate: float,
    device: torch.device,
) -> Tensor:
    """Return the dropout mask [batch, num_heads, seq, seq] of these samples and heads: global row = ((sample * heads) + head) * seq + query."""
    sample = torch.arange(first_sample, first_sample + batch, device=device)[:, None, None]
    head = torch.arange(first_head, first_head + num_heads, device=device)[None, :, None]
    query = torch.arange(seq_len, device=device)[None, None, :]
    rows = ((sample * total_heads + head) * seq_len + query).flatten()
    return keep_mask(key, rows, seq_len, rate).view(batch, num_heads, seq_len, seq_len)
