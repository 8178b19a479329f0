"""Attention in plain torch: scaled_dot_product_attention where it has the variant, else explicit score matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.attention.options import CAUSAL, AttentionDropout, AttentionOptions, Documents, Sizes, sizes_of
from trimaran.kernels.random import keep_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = CAUSAL,
    *,
    slopes: Tensor | None = None,
    documents: Documents | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Return attention [batch, seq, heads, head_dim].

    Args:
        q: [batch, seq, heads, head_dim].
        k, v: [batch, keys, kv_heads, head_dim], heads a multiple of kv_heads: query head i reads kv head
            i // (heads / kv_heads). Where keys outnumber queries, the queries have the last positions.
        slopes: [heads] float32, ALiBi: scores are reduced by slope * distance; see `alibi_slopes`.
        documents: packed documents that must not attend to each other.
    A query that attends to no key gets zeros. Raises ValueError for inconsistent shapes.
    """
    sizes = sizes_of(q, k, v, slopes, documents)
    if dropout is not None or options.softcap is not None or sizes.batch * sizes.seq_k == 0:
        return _explicit(q, k, v, sizes, options, slopes, documents, dropout)[0]
    if documents is not None and q.device.type == "cpu":
        return _apart(q, k, v, options, slopes, documents)
    plain = (
        options.window is None
        and slopes is None
        and documents is None
        and (not options.causal or sizes.seq_q == sizes.seq_k)
    )
    mask = None if plain else _additive_mask(q, sizes, options, slopes, documents)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain and options.causal,
        scale=options.scale,
        enable_gqa=sizes.heads != sizes.kv_heads,
    )
    return out.transpose(1, 2)


def _apart(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, slopes: Tensor | None, documents: Documents
) -> Tensor:
    """Return `attention`, one document after the other: on a CPU much less work than the masked pairs of a sequence.

    On a GPU each document would take launches of its own, and the host would wait for their lengths.
    """
    lengths = documents.starts.diff().tolist()
    queries, keys, values = (x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (q, k, v))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([attention(*part, options, slopes=slopes) for part in parts], dim=1).view_as(q)


def keeps_scores(options: AttentionOptions, dropout: AttentionDropout | None) -> bool:
    """Return whether autograd keeps the scores of `attention` for its backward pass."""
    return dropout is not None or options.softcap is not None


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = CAUSAL,
    *,
    slopes: Tensor | None = None,
    documents: Documents | None = None,
    dropout: AttentionDropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (attention, log-sum-exp of the scores [batch, seq, heads], float32 at least), both differentiable.

    Arguments as in `attention`. Results over parts of the keys can be combined by their log-sum-exp (ring attention,
    Liu et al. 2023). A query that attends to no key has -inf.
    """
    return _explicit(q, k, v, sizes_of(q, k, v, slopes, documents), options, slopes, documents, dropout)


def visible(
    sizes: Sizes, options: AttentionOptions, documents: Documents | None, device: torch.device
) -> Tensor | None:
    """Return a bool mask, True where a query attends to a key, that broadcasts to [batch, heads, seq, keys].

    None: every query attends to every key.
    """
    distance = _distance(sizes, device)
    mask = None
    if options.causal:
        mask = distance >= 0
    if options.window is not None:
        near = (distance < options.window) & (distance > -options.window)
        mask = near if mask is None else mask & near
    if documents is not None:
        number = documents.numbers.view(sizes.batch, 1, -1)
        same = number.unsqueeze(-1) == number.unsqueeze(-2)
        mask = same if mask is None else mask & same
    return mask


def _distance(sizes: Sizes, device: torch.device) -> Tensor:
    """Return query position - key position [seq, keys] int64."""
    query = torch.arange(sizes.seq_k - sizes.seq_q, sizes.seq_k, device=device)
    return query[:, None] - torch.arange(sizes.seq_k, device=device)[None, :]


def _additive_mask(
    q: Tensor, sizes: Sizes, options: AttentionOptions, slopes: Tensor | None, documents: Documents | None
) -> Tensor | None:
    """Return what is added to the scores [.., seq, keys], in q's dtype; bool where it is only a mask."""
    mask = visible(sizes, options, documents, q.device)
    if slopes is None:
        return mask
    bias = slopes.to(q.dtype).view(-1, 1, 1) * -_distance(sizes, q.device).abs().to(q.dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sizes,
    options: AttentionOptions,
    slopes: Tensor | None,
    documents: Documents | None,
    dropout: AttentionDropout | None,
) -> tuple[Tensor, Tensor]:
    """Return (attention, log-sum-exp) by the definition, with the scores of all heads in memory at once."""
    group = sizes.heads // sizes.kv_heads
    queries = q.transpose(1, 2).unflatten(1, (sizes.kv_heads, group))  # [batch, kv_heads, group, seq, head_dim]
    keys, values = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))
    scores = ((queries @ keys.transpose(-2, -1)) * options.scale_for(sizes.head_dim)).flatten(1, 2)
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    if options.softcap is not None:
        scores = (scores / options.softcap).tanh() * options.softcap
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype).view(-1, 1, 1) * _distance(sizes, q.device).abs()
    mask = visible(sizes, options, documents, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True) if sizes.seq_k else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    # A row without a key has lse = -inf; without the mask its probabilities would be NaN instead of zero.
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    if dropout is not None:
        keep = attention_keep_mask(dropout, sizes, documents, q.device)
        probabilities = probabilities * keep / (1.0 - dropout.rate)
    out = probabilities.to(v.dtype).unflatten(1, (sizes.kv_heads, group)) @ values
    return out.flatten(1, 2).transpose(1, 2), lse.squeeze(-1).transpose(1, 2)


def attention_keep_mask(
    dropout: AttentionDropout, sizes: Sizes, documents: Documents | None, device: torch.device
) -> Tensor:
    """Return the dropout mask [batch, heads, seq, keys] bool, False where a probability is dropped."""
    sample = torch.arange(dropout.first_sample, dropout.first_sample + sizes.batch, device=device)[:, None, None]
    head = torch.arange(dropout.first_head, dropout.first_head + sizes.heads, device=device)[None, :, None]
    query = torch.arange(sizes.seq_q, device=device)[None, None, :]
    rows = ((sample * dropout.total_heads + head) * sizes.seq_q + query).flatten()
    mask = keep_mask(dropout.key, rows, sizes.seq_k, dropout.rate).view(
        sizes.batch, sizes.heads, sizes.seq_q, sizes.seq_k
    )
    if documents is None:
        return mask
    # Columns count from the start of the query's document: key j of the sequence is column j - begin. Earlier keys are
    # masked anyway.
    begin = documents.starts[documents.numbers].view(sizes.batch, 1, sizes.seq_q, 1) % sizes.seq_q
    column = torch.arange(sizes.seq_k, device=device) - begin
    return mask.gather(-1, column.clamp(min=0).expand_as(mask))


def flops(sizes: Sizes, options: AttentionOptions, *, backward: bool = False) -> float:
    """Return the matrix-product FLOPs of one call over unmasked pairs: 4 * batch * heads * pairs * head_dim.

    The backward pass has 2.5 times as many.
    """
    if options.window is None and not options.causal:
        pairs = float(sizes.seq_q * sizes.seq_k)
    else:
        reach = options.window or sizes.seq_k
        positions = range(sizes.seq_k - sizes.seq_q, sizes.seq_k)
        after = 0 if options.causal else reach - 1
        pairs = float(sum(max(0, min(sizes.seq_k - 1, i + after) - max(0, i - reach + 1) + 1) for i in positions))
    return 4.0 * sizes.batch * sizes.heads * sizes.head_dim * pairs * (2.5 if backward else 1.0)
