"""Attention with any mask, in plain torch: for sequences that are packed as a tree."""

import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.attention.options import AttentionOptions


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, options: AttentionOptions) -> Tensor:
    """Return attention [batch, seq, heads, head_dim] with `bias` added to the scores.

    No gradient is meant to flow.

    Args:
        q: [batch, seq, heads, head_dim]; k, v: [batch, keys, kv_heads, head_dim], as in `reference.attention`.
        bias: broadcasts to [batch, heads, seq, keys], float32 (float64 for float64); -inf where a query does not attend
            to a key. Each query attends to one key at least.
        options: scale and softcap; what is causal or near is the mask's matter.
    """
    if options.softcap is None:
        plain = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias.to(q.dtype),
            scale=options.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return plain.transpose(1, 2)
    group = q.shape[2] // k.shape[2]
    queries = q.to(bias.dtype).transpose(1, 2).unflatten(1, (-1, group))  # [batch, kv_heads, group, seq, head_dim]
    keys, values = (x.to(bias.dtype).transpose(1, 2).unsqueeze(2) for x in (k, v))
    scores = (queries @ keys.transpose(-2, -1)).flatten(1, 2).mul_(options.scale_for(q.shape[3]) / options.softcap)
    scores = scores.tanh_().mul_(options.softcap).add_(bias)
    out: Tensor = scores.softmax(-1).unflatten(1, (-1, group)) @ values
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype)
