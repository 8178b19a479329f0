"""Attention over a key-value cache in plain torch: the CPU path, and the truth of the Triton kernels' tests.

The query heads that read one kv head, of all new tokens, are the rows of one small matrix (row = token * group + head in its group), so that grouped-query
heads need no copies of the cache and a single new token needs no mask where all samples are of one length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.decode.cache import cache_capacity, check_cache


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raise ValueError, with the rule and the values, where the arguments of `decode_attention` do not go together."""
    check_cache(k_cache, v_cache, lengths, block_table, q, "q")
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q ({heads}) must be a multiple of the cache's kv_heads ({kv_heads})")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), or None; it is {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None; it is {softcap}")
    if alibi_slopes is not None and (alibi_slopes.shape != (heads,) or alibi_slopes.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"alibi_slopes must be float32 of shape [{heads}] (heads); it is {alibi_slopes.dtype} of shape {list(alibi_slopes.shape)}"
        )


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
    """Return the attention of the last tokens of each sequence over its cache: [batch, q_len, heads, head_dim], dtype of q.

    Args:
        q: [batch, q_len, heads, head_dim], the last q_len tokens of each sample, whose keys and values are in the cache already: query i of sample b
            stands at position lengths[b] - q_len + i and sees the keys [0, that position]. A query before position 0 gives zeros.
        k_cache, v_cache: [batch, max_len, kv_heads, head_dim], heads a multiple of kv_heads (query head i reads kv head i // (heads / kv_heads)); with
            a block_table, pages [num_blocks, block_size, kv_heads, head_dim], block_size a power of two of 8 or more. What they hold outside of a
            sample's tokens is of no account, not even where it is not finite.
        lengths: [batch] int32, tokens of each sample in the cache, the new ones included; 0 gives zeros.
        block_table: [batch, max_blocks] int32, the pages of each sample; entries that no query needs are not read.
        window: a query sees itself and the window - 1 keys before it; None for all.
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: [heads] float32: slope * (query position - key position) is taken off a score (Press et al. 2022, section 3).
        scale: of the query-key products, head_dim ** -0.5 unless told.
        max_length: no length is larger; known to the host, it spares work where the capacity is far larger and lengths lies on a device.
    No gradient flows. Raises ValueError for shapes, dtypes, options and (lengths on a CPU) lengths that do not fit.
    """
    check_decode(q, k_cache, v_cache, lengths, block_table, window, softcap, alibi_slopes)
    batch, q_len, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    shortest, longest = _range_of(lengths, cache_capacity(k_cache, block_table), max_length)
    # Only keys from `first` on, the oldest that a query of the shortest sample sees.
    first = 0 if window is None else max(0, shortest - q_len + 1 - window)
    if longest == 0 or q.numel() == 0:
        return torch.zeros_like(q)
    equal = shortest == longest
    needed = None if equal else _needed(lengths, q_len, window, first, longest)
    k, v = (_columns(cache, block_table, needed, first, longest) for cache in (k_cache, v_cache))
    if needed is not None and not (lengths.device.type == "cpu" and _finite(k, v, shortest - first if window is None else 0)):
        # A weight of zero does not undo a NaN.
        k, v = (x.masked_fill(~needed[:, :, None, None], 0) for x in (k, v))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = None
    if not equal or q_len > 1 or alibi_slopes is not None:
        mask = _mask(lengths[:1] if equal else lengths, q, kv_heads, torch.arange(first, longest, device=q.device), window, alibi_slopes)
    rows = q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    if softcap is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    else:
        out = _capped(rows, k, v, mask, softcap, head_dim**-0.5 if scale is None else scale)
    if shortest < q_len:
        before = lengths[:, None] - q_len + torch.arange(q_len, device=q.device) < 0
        out = out.masked_fill(before.repeat_interleave(heads // kv_heads, dim=1)[:, None, :, None], 0)
    return out.view(batch, kv_heads, q_len, -1, head_dim).transpose(1, 2).reshape(q.shape)


def _range_of(lengths: Tensor, capacity: int, max_length: int | None) -> tuple[int, int]:
    """Return bounds of the lengths: the true ones on a CPU, elsewhere what is known without waiting for the device."""
    if lengths.device.type == "cpu":
        values = lengths.tolist() or [0]
        return min(values), max(values)
    return 0, capacity if max_length is None else min(capacity, max_length)


def _needed(lengths: Tensor, q_len: int, window: int | None, first: int, stop: int) -> Tensor:
    """Return which keys [first, stop) a query of each sample sees: [batch, stop - first] bool."""
    key, length = torch.arange(first, stop, device=lengths.device), lengths[:, None]
    needed = key < length
    return needed if window is None else needed.logical_and_(key > length - q_len - window)


def _columns(cache: Tensor, block_table: Tensor | None, needed: Tensor | None, first: int, stop: int) -> Tensor:
    """Return the tokens [first, stop) of every sample [batch, stop - first, kv_heads, head_dim]: a view of a contiguous cache, a copy of a paged one."""
    if block_table is None:
        return cache[:, first:stop]
    size = cache.shape[1]
    first_block, stop_block = first // size, -(-stop // size)
    table = block_table[:, first_block:stop_block]
    if needed is not None:  # entries outside of the sample may hold anything
        whole = F.pad(needed, (first - first_block * size, stop_block * size - stop))
        table = table.where(whole.unflatten(1, (-1, size)).any(-1), 0)
    pages = cache.index_select(0, table.flatten()).view(len(table), -1, *cache.shape[2:])
    return pages[:, first - first_block * size : stop - first_block * size]


def _finite(k: Tensor, v: Tensor, first: int) -> bool:
    """Return whether the columns from `first` on are finite: a sum is many times cheaper than a copy, and where it overflows no harm is done."""
    return bool((k[:, first:].sum((1, 2, 3)) + v[:, first:].sum((1, 2, 3))).isfinite().all())


def _mask(lengths: Tensor, q: Tensor, kv_heads: int, key: Tensor, window: int | None, slopes: Tensor | None) -> Tensor:
    """Return the mask of rows and keys, [batch or 1, 1, rows, keys] bool, or the biases [batch or 1, kv_heads, rows, keys] with ALiBi's slopes."""
    q_len, heads = q.shape[1:3]
    query = lengths[:, None] - q_len + torch.arange(q_len, device=q.device)
    distance = query[:, :, None] - key
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if slopes is None:
        return visible.repeat_interleave(heads // kv_heads, dim=1)[:, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = distance[:, None, :, None, :] * -slopes.to(wide).view(kv_heads, 1, -1, 1)
    return bias.masked_fill_(~visible[:, None, :, None, :], -torch.inf).flatten(2, 3)


def _capped(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
    """Return attention with scores softcap * tanh(score / softcap); rows [batch, kv_heads, rows, head_dim], k and v [batch, kv_heads, keys, head_dim]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    scores = (rows.to(wide) @ k.to(wide).transpose(-2, -1)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    return (scores.softmax(-1) @ v.to(wide)).to(rows.dtype)
