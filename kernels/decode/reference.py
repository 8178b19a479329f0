"""Attention over a key-value cache in plain torch: the CPU path, and the reference of the Triton kernels.

The query heads of one kv head, for all new tokens, form the rows of one matrix (row = token * group + head in its
group). Grouped-query heads then need no copy of the cache, and one new token needs no mask where all samples have the
same length.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.attention.options import AttentionOptions
from trimaran.kernels.attention.reference import attention
from trimaran.kernels.decode.cache import cache_capacity, cached_on, check_cache

_FEW_TOKENS = 8  # above it, samples of different lengths run faster in a call each
_WASTED = 128  # keys past a sample's own, on average, above which one token of each does too


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> list[int] | None:
    """Return the lengths where they are on a CPU.

    Raises ValueError, with the rule and the values, for inconsistent arguments of `decode_attention`.
    """
    values = check_cache(k_cache, v_cache, lengths, block_table, q, "q")
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q ({heads}) must be a multiple of the cache's kv_heads ({kv_heads})")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), or None; it is {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None; it is {softcap}")
    if alibi_slopes is not None and (
        alibi_slopes.shape != (heads,) or alibi_slopes.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"alibi_slopes must be float32 of shape [{heads}] (heads); "
            f"it is {alibi_slopes.dtype} of shape {list(alibi_slopes.shape)}"
        )
    return values


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Return the attention of each sample's last tokens over its cache [batch, q_len, heads, head_dim], dtype of q.

    Args:
        q: [batch, q_len, heads, head_dim], the last q_len tokens of each sample, whose keys and values are in the cache
            already. Query i of sample b has position p = lengths[b] - q_len + i and attends to the keys [0, p]. Where
            p < 0 the result is zero.
        k_cache, v_cache: [batch, max_len, kv_heads, head_dim], heads a multiple of kv_heads (query head i reads kv head
            i // (heads / kv_heads)); with a block_table, pages [num_blocks, block_size, kv_heads, head_dim], block_size
            a power of two of 8 or more. Values outside a sample's tokens do not matter, even if they are not finite.
        lengths: [batch] int32, tokens of each sample in the cache, the new ones included; 0 gives zeros.
        block_table: [batch, max_blocks] int32, the pages of each sample; entries that no query needs are not read.
        window: a query attends to itself and the window - 1 keys before it; None: to all.
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: [heads] float32: slope * (query position - key position) is subtracted from a score (Press et al.
            2022, section 3).
        scale: factor of the query-key products; None: head_dim ** -0.5.
        max_length: upper bound of the lengths, on the host; reduces the work where lengths are on a device.
    No gradient flows. Raises ValueError for inconsistent shapes, dtypes and options, and on a CPU for invalid lengths.
    """
    values = check_decode(q, k_cache, v_cache, lengths, block_table, window, softcap, alibi_slopes)
    q_len, head_dim = q.shape[1], q.shape[3]
    shortest, longest = _range_of(values, cache_capacity(k_cache, block_table), max_length)
    if longest == 0 or q.numel() == 0:
        return torch.zeros_like(q)
    equal = shortest == longest
    if values is not None and block_table is None and not equal and _differ_much(values, q_len, window):
        return _each_alone(
            q, k_cache, v_cache, values, AttentionOptions(window=window, softcap=softcap, scale=scale), alibi_slopes
        )
    # Keys before `first` are outside every query's window.
    first = 0 if window is None else max(0, shortest - q_len + 1 - window)
    needed = (
        None
        if equal
        else cached_on(lengths, ("needed", q_len, window), lambda: _needed(lengths, q_len, window, first, longest))
    )
    k, v = (_columns(cache, block_table, needed, first, longest) for cache in (k_cache, v_cache))
    mask = None
    if not equal or q_len > 1 or alibi_slopes is not None:
        mask = _mask(lengths, equal, q, k.shape[2], (first, longest), window, alibi_slopes)
    scale = head_dim**-0.5 if scale is None else scale
    out = _weighted(q, k, v, mask, softcap, scale, lengths if shortest < q_len else None)
    # Outside a sample's tokens the cache may hold values that are not finite, and weight zero does not remove those.
    # Checking the result is cheaper than checking the cache.
    if needed is not None and not (lengths.device.type == "cpu" and out.sum().isfinite()):
        k, v = (x.masked_fill(~needed[:, :, None, None], 0) for x in (k, v))
        out = _weighted(q, k, v, mask, softcap, scale, lengths if shortest < q_len else None)
    return out


def _differ_much(lengths: list[int], q_len: int, window: int | None) -> bool:
    """Return whether samples of different lengths run faster one by one."""
    if q_len > _FEW_TOKENS:
        return True
    return q_len == 1 and window is None and len(lengths) * max(lengths) - sum(lengths) > _WASTED * len(lengths)


def _each_alone(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: list[int],
    options: AttentionOptions,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Return the attention of samples of different lengths, one by one: their joint mask would exceed the cache."""
    out, q_len = torch.zeros_like(q), q.shape[1]
    if q_len == 1 and options.window is None:  # it attends to all keys, and needs no mask for that
        options = replace(options, causal=False)
    for sample, length in enumerate(lengths):
        if length > 0:
            part, start = slice(sample, sample + 1), max(0, q_len - length)
            k, v = k_cache[part, :length], v_cache[part, :length]
            out[part, start:] = attention(q[part, start:], k, v, options, slopes=alibi_slopes)
    return out


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None, scale: float, lengths: Tensor | None
) -> Tensor:
    """Return the means of v [batch, keys, kv_heads, head_dim] weighted by the softmax of q's scores, in q's shape.

    Args:
        mask: see `_mask`.
        lengths: of the samples, where some have fewer tokens than q (queries before position 0 give zeros), else None.
    """
    batch, q_len, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # [batch, kv_heads, q_len * group, head_dim]; views for a single token.
    rows = q.view(batch, q_len, kv_heads, -1, head_dim).transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    else:
        out = _capped(rows, k, v, mask, softcap, scale)
    if lengths is not None:
        before = lengths[:, None] - q_len + torch.arange(q_len, device=q.device) < 0
        out = out.masked_fill(before.repeat_interleave(heads // kv_heads, dim=1)[:, None, :, None], 0)
    return out.view(batch, kv_heads, q_len, -1, head_dim).transpose(1, 2).reshape(q.shape)


def _range_of(values: list[int] | None, capacity: int, max_length: int | None) -> tuple[int, int]:
    """Return bounds of the lengths: exact on a CPU, else those known without waiting for the device."""
    if values is not None:
        return (min(values), max(values)) if values else (0, 0)
    return 0, capacity if max_length is None else min(capacity, max_length)


def _needed(lengths: Tensor, q_len: int, window: int | None, first: int, stop: int) -> Tensor:
    """Return which keys [first, stop) some query of each sample attends to [batch, stop - first] bool."""
    key, length = torch.arange(first, stop, device=lengths.device), lengths[:, None]
    needed = key < length
    return needed if window is None else needed.logical_and_(key > length - q_len - window)


def _columns(cache: Tensor, block_table: Tensor | None, needed: Tensor | None, first: int, stop: int) -> Tensor:
    """Return the tokens [first, stop) of every sample [batch, stop - first, kv_heads, head_dim].

    A view of a contiguous cache, a copy of a paged one.
    """
    if block_table is None:
        return cache[:, first:stop]
    size = cache.shape[1]
    first_block, stop_block = first // size, -(-stop // size)
    table = block_table[:, first_block:stop_block]
    if needed is not None:  # table entries outside the sample may be invalid
        whole = F.pad(needed, (first - first_block * size, stop_block * size - stop))
        table = table.where(whole.unflatten(1, (-1, size)).any(-1), 0)
    pages = cache.index_select(0, table.flatten()).view(len(table), -1, *cache.shape[2:])
    return pages[:, first - first_block * size : stop - first_block * size]


def _mask(
    lengths: Tensor,
    equal: bool,
    q: Tensor,
    kv_heads: int,
    keys: tuple[int, int],
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """Return the additive mask of the scores, -inf where a row does not attend to a key.

    Its shape is [batch or 1, 1, rows or 1, keys]; with ALiBi's slopes [batch or 1, kv_heads, rows, keys].
    """
    q_len, group = q.shape[1], q.shape[2] // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)

    def distances() -> Tensor:
        query = (lengths[:1] if equal else lengths)[:, None] - q_len + torch.arange(q_len, device=q.device)
        return query[:, :, None] - torch.arange(*keys, device=q.device)

    def visible(distance: Tensor) -> Tensor:
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def additive() -> Tensor:
        hidden = visible(distances()).logical_not_()
        if q_len > 1:  # with one token all rows have the same mask
            hidden = hidden.repeat_interleave(group, dim=1)
        return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)[:, None]

    if slopes is None:
        return cached_on(lengths, ("mask", equal, q_len, group, keys, window, q.dtype), additive)
    distance = distances()
    bias = distance[:, None, :, None, :] * -slopes.to(wide).view(kv_heads, 1, -1, 1)
    return bias.masked_fill_(~visible(distance)[:, None, :, None, :], -torch.inf).flatten(2, 3)


def _capped(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
    """Return attention with scores softcap * tanh(score / softcap).

    rows: [batch, kv_heads, rows, head_dim]; k, v: [batch, kv_heads, keys, head_dim].
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    scores = (rows.to(wide) @ k.to(wide).transpose(-2, -1)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    return (scores.softmax(-1) @ v.to(wide)).to(rows.dtype)
