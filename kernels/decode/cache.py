"""The key-value cache: its two formats, the checks of its arguments, and appending tokens.

Contiguous: k_cache and v_cache [batch, max_len, kv_heads, head_dim]; token t of sample b is k_cache[b, t].
Paged (Kwon et al. 2023, PagedAttention, section 4): [num_blocks, block_size, kv_heads, head_dim] and block_table
[batch, max_blocks]; token t of sample b is k_cache[block_table[b, t // block_size], t % block_size]. Samples may share
full blocks.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.launch import launch, tuned

_T = TypeVar("_T")
_CACHE = "trimaran_cache"  # attribute of a tensor: (its version, key -> what was computed from it)
_SMALLEST_BLOCK = 8  # tokens: with fewer, kernels would read the table nearly as often as the cache


def cache_capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Return the most tokens of a sample that the cache holds."""
    return k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]


def check_cache(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None, like: Tensor, name: str
) -> list[int] | None:
    """Check a cache against `like` [batch, tokens, heads, head_dim], called `name`; return the lengths on a CPU.

    On a device lengths are not read, because that would wait for the device, and the result is None.
    Raises ValueError with the rule and the values.
    """
    if like.dim() != 4 or k_cache.dim() != 4 or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{name} must be [batch, tokens, heads, head_dim] and k_cache and v_cache of one shape "
            f"[., ., kv_heads, head_dim]; they are {list(like.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    batch, tokens, _, head_dim = like.shape
    if head_dim != k_cache.shape[3]:
        raise ValueError(f"{name} and the cache must have one head_dim; they have {head_dim} and {k_cache.shape[3]}")
    if not like.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"{name}, k_cache and v_cache must have one dtype; "
            f"they have {like.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise ValueError(
            f"lengths must be int32 of shape [{batch}] (batch); it is {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"a contiguous cache must have the batch of {name}, {batch}; it has {k_cache.shape[0]}")
    else:
        _check_pages(k_cache.shape[1], block_table, batch)
    capacity = cache_capacity(k_cache, block_table)
    if tokens > capacity:
        raise ValueError(f"{name} has {tokens} tokens, over the cache's capacity of {capacity} a sample")
    if lengths.device.type != "cpu":
        return None
    values: list[int] = lengths.tolist()
    if values and not 0 <= min(values) <= max(values) <= capacity:
        raise ValueError(
            f"lengths must be in [0, {capacity}] (the cache's capacity); they are in [{min(values)}, {max(values)}]"
        )
    return values


def _check_pages(block_size: int, block_table: Tensor, batch: int) -> None:
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be int32 of shape [{batch}, max_blocks] (batch first); "
            f"it is {block_table.dtype} of shape {list(block_table.shape)}"
        )
    if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ValueError(
            f"the block size of a paged cache must be a power of two, at least {_SMALLEST_BLOCK}; it is {block_size}"
        )


def _check_new(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None
) -> list[int] | None:
    values = check_cache(k_cache, v_cache, lengths, block_table, k, "k")
    if k.shape != v.shape or k.dtype != v.dtype or k.shape[2] != k_cache.shape[2]:
        raise ValueError(
            f"k and v must have one shape and dtype, and the cache's kv_heads ({k_cache.shape[2]}); "
            f"they are {k.dtype} {list(k.shape)} and {v.dtype} {list(v.shape)}"
        )
    return values


@torch.no_grad()
def append_to_cache_(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, block_table: Tensor | None = None
) -> None:
    """Write k and v as the last tokens of each sample, at the positions [lengths - new, lengths), in place.

    Args:
        k_cache, v_cache: [batch, max_len, kv_heads, head_dim], or with a block_table [num_blocks, block_size, kv_heads,
            head_dim].
        k, v: [batch, new, kv_heads, head_dim], the cache's dtype.
        lengths: [batch] int32, tokens of each sample after appending. Tokens before position 0 are dropped, so nothing
            is written for a sample of length 0.
        block_table: [batch, max_blocks] int32; two samples must not share a block that is written.
    No gradient flows. Raises ValueError for inconsistent shapes and dtypes, and on a CPU for invalid lengths.
    """
    values = _check_new(k_cache, v_cache, k, v, lengths, block_table)
    new = k.shape[1]
    if k.numel() == 0:
        return
    if values is not None and block_table is None and min(values) == max(values) >= new:
        k_cache.narrow(1, values[0] - new, new).copy_(k)
        v_cache.narrow(1, values[0] - new, new).copy_(v)
        return
    drops = values is None or min(values) < new
    sample, position, real = cached_on(lengths, ("places", new), lambda: _places(lengths, new, drops))
    if real is not None:
        k, v = k[real], v[real]
    if block_table is not None:
        sample, position = block_table[sample, position // k_cache.shape[1]].long(), position % k_cache.shape[1]
    k_cache.index_put_((sample, position), k)
    v_cache.index_put_((sample, position), v)


def _places(lengths: Tensor, new: int, drops: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (sample, position) of the new tokens, and where some are dropped a mask [batch, new] of the others."""
    position = (lengths[:, None] - new).long() + torch.arange(new, device=lengths.device)
    sample = torch.arange(len(lengths), device=lengths.device)[:, None].expand_as(position)
    if not drops:
        return sample, position, None
    real = position >= 0
    return sample[real], position[real], real


def cached_on(lengths: Tensor, key: Hashable, make: Callable[[], _T]) -> _T:
    """Return make(), cached on the tensor under `key` until the tensor changes: all layers share the result.

    Tensors made in inference mode have no version counter; nothing is cached on them.
    """
    if lengths.is_inference():
        return make()
    version: int
    made: dict[Hashable, _T]
    version, made = getattr(lengths, _CACHE, (-1, {}))
    if version != lengths._version:
        made = {}
        setattr(lengths, _CACHE, (lengths._version, made))
    if key not in made:
        made[key] = make()
    return made[key]


@triton.jit
def _append(
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    table_ptr: tl.tensor,
    k_cache_strides: tl.tuple,
    v_cache_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    table_strides: tl.tuple,
    new: tl.tensor,
    width: tl.tensor,
    capacity: tl.tensor,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sample = (tl.program_id(0) // new).to(tl.int64)
    token = tl.program_id(0) % new
    position = (tl.load(lengths_ptr + sample) - new + token).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, dim = (elements // HEAD_DIM).to(tl.int64), elements % HEAD_DIM
    inside = elements < width
    if (position >= 0) & (position < capacity):
        first, slot = sample, position
        if PAGE:
            first = tl.load(table_ptr + sample * table_strides[0] + position // PAGE * table_strides[1]).to(tl.int64)
            slot = position % PAGE
        k = tl.load(
            k_ptr + sample * k_strides[0] + token * k_strides[1] + head * k_strides[2] + dim * k_strides[3], inside
        )
        v = tl.load(
            v_ptr + sample * v_strides[0] + token * v_strides[1] + head * v_strides[2] + dim * v_strides[3], inside
        )
        k_to = (
            first * k_cache_strides[0]
            + slot * k_cache_strides[1]
            + head * k_cache_strides[2]
            + dim * k_cache_strides[3]
        )
        v_to = (
            first * v_cache_strides[0]
            + slot * v_cache_strides[1]
            + head * v_cache_strides[2]
            + dim * v_cache_strides[3]
        )
        tl.store(k_cache_ptr + k_to, k, inside)
        tl.store(v_cache_ptr + v_to, v, inside)


@torch.no_grad()
def triton_append_to_cache_(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, block_table: Tensor | None = None
) -> None:
    """`append_to_cache_` in one kernel. On a GPU tokens past the capacity are dropped."""
    _check_new(k_cache, v_cache, k, v, lengths, block_table)
    batch, new, kv_heads, head_dim = k.shape
    width = kv_heads * head_dim
    config = tuned("decode", k.device, "append")
    launch(
        _append,
        (batch * new, triton.cdiv(width, config["BLOCK"])),
        k_cache,
        v_cache,
        k,
        v,
        lengths.contiguous(),
        lengths if block_table is None else block_table,
        k_cache.stride(),
        v_cache.stride(),
        k.stride(),
        v.stride(),
        (0, 0) if block_table is None else block_table.stride(),
        new,
        width,
        cache_capacity(k_cache, block_table),
        PAGE=0 if block_table is None else k_cache.shape[1],
        HEAD_DIM=head_dim,
        **config,
    )
