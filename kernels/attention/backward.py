"""The backward pass of attention in Triton (FlashAttention-2: Dao 2023, algorithm 2).

    p = exp(s - lse)      dv = p^T do      dp = do v^T      delta = sum(do * out) - dlse      ds = p (dp - delta)
    dq = scale ds k       dk = scale ds^T q

Two kernels: one holds BLOCK_N keys and walks over their queries, for dk and dv; one holds BLOCK_M queries and walks
over their keys, for dq. Neither uses atomics, and both give the same bits every time. Without `deterministic` the first
adds dq too, with atomic additions in float32, and the second does not run: five matrix products instead of seven.

Each query head of a group writes its own dk and dv in float32; a sum over the group follows. A loop over the group
inside the kernel would take forty more registers per thread than there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.attention.call import NOT_SPECIALIZED, Call
from trimaran.kernels.attention.tile import (
    LOG2E,
    apply_softcap_alibi,
    attention_mask,
    extent,
    keep,
    key_ranges,
    mask_row,
    masked_block,
    narrow,
    product,
    query_ranges,
    schedule,
    slope_of,
)
from trimaran.kernels.launch import launch, tuned


@triton.jit(do_not_specialize=("tokens",))
def _attention_statistics(
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    dlse_ptr: tl.tensor,
    base_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    head_dim: tl.tensor,
    HAS_DLSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Store, per query, delta and base: the log-sum-exp in units of log2(e).

    A query without keys has an infinite base, which makes its weights zero.
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    at = (token * heads + head)[:, None] * head_dim + dim[None, :]
    inside = (token < tokens)[:, None] & (dim < head_dim)[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32), 1)
    row = head * tokens + token
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=token < tokens, other=0.0)
    lse = tl.load(lse_ptr + row, mask=token < tokens, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # a query without keys contributes no gradient
    tl.store(base_ptr + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=token < tokens)
    tl.store(delta_ptr + row, delta, mask=token < tokens)


@triton.jit
def _key_step(
    sums: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_desc: tl.tensor,
    do_desc: tl.tensor,
    dq_ptr: tl.tensor,
    base_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    first_q: tl.tensor,
    m: tl.tensor,
    queries: tl.tensor,
    key: tl.tensor,
    keys: tl.tensor,
    place: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    draw: tl.tensor,
    keep_scale: tl.tensor,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FUSED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add BLOCK_M queries to (dk / scale, dv / keep_scale) of BLOCK_N keys. place: (head, heads, head_dim, tokens).

    Tiles are [keys, queries], the form in which they are the left factors of dk and dv.
    """
    dk, dv = sums
    head, heads, head_dim, tokens = place
    at = m + tl.arange(0, BLOCK_M)
    q = q_desc.load([first_q + m, head * head_dim])
    do = do_desc.load([first_q + m, head * head_dim])
    statistics = tl.cast(head, tl.int64) * tokens + first_q + at
    if MASKED:  # an infinite base gives queries past the end weight zero
        base = tl.load(base_ptr + statistics, mask=at < queries, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=at < queries, other=0.0)
    else:
        base = tl.load(base_ptr + statistics)
        delta = tl.load(delta_ptr + statistics)
    query, key_at = (at + keys - queries)[None, :], (key + tl.arange(0, BLOCK_N))[:, None]
    scores, cap_slope = apply_softcap_alibi(product(k, q, V), query, key_at, bias, V)
    weights = tl.exp2(scores - base[None, :])
    if MASKED:
        weights = tl.where(attention_mask(query, key_at, keys, bias[0], V), weights, 0.0)
    if V.dropout:
        kept = tl.trans(keep(row + at, key, draw, BLOCK_N))
    if DV:
        dropped = weights
        if V.dropout:
            dropped = tl.where(kept, weights, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=V.precision)
    if DK:
        dweights = product(v, do, V)
        if V.dropout:
            dweights = tl.where(kept, dweights * keep_scale, 0.0)
        dscores = (weights * (dweights - delta[None, :]) * cap_slope).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=V.precision)
        if FUSED:
            dq = tl.dot(dscores.T, k, input_precision=V.precision) * bias[1]
            dim = tl.arange(0, HEAD_DIM)
            where = dq_ptr + ((first_q + at).to(tl.int64) * heads + head)[:, None] * head_dim + dim[None, :]
            tl.atomic_add(where, dq, mask=(at < queries)[:, None] & (dim < head_dim)[None, :], sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_backward_keys(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    do_desc: tl.tensor,
    dq_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    base_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    blocks: tl.tensor,
    num_head_indices: tl.tensor,
    tile_group: tl.tensor,
    seq_q: tl.tensor,
    seq_k: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    head_dim: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    first_row: tl.int64,
    total_heads: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    mask_blocks: tl.int64,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    V: tl.constexpr,
    FUSED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    block, head_index = schedule(tl.program_id(0), blocks, num_head_indices, tile_group)
    index, head = head_index // heads, head_index % heads
    first_q, queries = extent(index, starts_ptr, seq_q, V)
    first_k, keys = extent(index, starts_ptr, seq_k, V)
    key = (blocks - 1 - block) * BLOCK_N  # the first keys, which most queries attend to, run first
    if key >= keys:
        return
    column, key_at, dim = head // group * head_dim, key + tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    k = narrow(k_desc.load([first_k + key, column]), head_dim, V, HEAD_DIM)
    v = narrow(v_desc.load([first_k + key, column]), head_dim, V, HEAD_DIM)
    if FUSED:  # rows of the next document must not reach dq
        k = tl.where((key_at < keys)[:, None], k, 0.0).to(k.dtype)
    place, row = (head, heads, head_dim, tokens), mask_row(first_row, total_heads, first_q, head, seq_q)
    bias, draw = (window, scale, softcap, slope_of(slopes_ptr, head, V)), (key0, key1, mask_blocks, threshold)
    sums = (tl.zeros([BLOCK_N, HEAD_DIM], tl.float32), tl.zeros([BLOCK_N, HEAD_DIM], tl.float32))
    start, whole, partial, stop = query_ranges(key, queries, keys - queries, window, V, BLOCK_M, BLOCK_N)
    # Keys past the end need a mask in every tile: their weights may be infinite, and infinity times a zero key is NaN.
    if FUSED:
        partial = tl.where(key + BLOCK_N > keys, whole, partial)
    # fmt: off
    for m in range(whole, partial, BLOCK_M):
        sums = _key_step(sums, k, v, q_desc, do_desc, dq_ptr, base_ptr, delta_ptr, first_q, m, queries, key, keys,
                         place, bias, row, draw, keep_scale, V, False, FUSED, DK, DV, HEAD_DIM, BLOCK_M, BLOCK_N)
    for step in range(0, whole - start + stop - partial, BLOCK_M):
        m = masked_block(step, start, whole, partial)
        sums = _key_step(sums, k, v, q_desc, do_desc, dq_ptr, base_ptr, delta_ptr, first_q, m, queries, key, keys,
                         place, bias, row, draw, keep_scale, V, True, FUSED, DK, DV, HEAD_DIM, BLOCK_M, BLOCK_N)
    # fmt: on
    dk, dv = sums
    at = ((first_k + key_at).to(tl.int64) * heads + head)[:, None] * head_dim + dim[None, :]
    inside = (key_at < keys)[:, None] & (dim < head_dim)[None, :]
    if DK:
        tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    if DV:
        tl.store(dv_ptr + at, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _query_step(
    dq: tl.tensor,
    q: tl.tensor,
    do: tl.tensor,
    base: tl.tensor,
    delta: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    token: tl.tensor,
    column: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    keys: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    draw: tl.tensor,
    keep_scale: tl.tensor,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add BLOCK_N keys to dq / scale of the queries."""
    k = k_desc.load([token, column])
    v = v_desc.load([token, column])
    key_at = (key + tl.arange(0, BLOCK_N))[None, :]
    scores, cap_slope = apply_softcap_alibi(product(q, k, V), query[:, None], key_at, bias, V)
    weights = tl.exp2(scores - base[:, None])
    if MASKED:
        weights = tl.where(attention_mask(query[:, None], key_at, keys, bias[0], V), weights, 0.0)
    dweights = product(do, v, V)
    if V.dropout:
        dweights = tl.where(keep(row, key, draw, BLOCK_N), dweights * keep_scale, 0.0)
    dscores = weights * (dweights - delta[:, None]) * cap_slope
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=V.precision)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_backward_queries(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    do_desc: tl.tensor,
    dq_ptr: tl.tensor,
    base_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    blocks: tl.tensor,
    num_head_indices: tl.tensor,
    tile_group: tl.tensor,
    seq_q: tl.tensor,
    seq_k: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    head_dim: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    first_row: tl.int64,
    total_heads: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    mask_blocks: tl.int64,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    block, head_index = schedule(tl.program_id(0), blocks, num_head_indices, tile_group)
    index, head = head_index // heads, head_index % heads
    first_q, queries = extent(index, starts_ptr, seq_q, V)
    first_k, keys = extent(index, starts_ptr, seq_k, V)
    if block * BLOCK_M >= queries:
        return
    m, dim = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    position = block * BLOCK_M + keys - queries
    query, column = position + tl.arange(0, BLOCK_M), head // group * head_dim
    bias, draw = (window, scale, softcap, slope_of(slopes_ptr, head, V)), (key0, key1, mask_blocks, threshold)
    row = mask_row(first_row, total_heads, first_q, head, seq_q) + m
    token = first_q + block * BLOCK_M
    q = narrow(q_desc.load([token, head * head_dim]), head_dim, V, HEAD_DIM)
    do = narrow(do_desc.load([token, head * head_dim]), head_dim, V, HEAD_DIM)
    statistics = tl.cast(head, tl.int64) * tokens + first_q + m
    base = tl.load(base_ptr + statistics, mask=m < queries, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=m < queries, other=0.0)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    start, whole, partial, stop = key_ranges(position, keys, window, V, BLOCK_M, BLOCK_N)
    # fmt: off
    for key in range(whole, partial, BLOCK_N):
        dq = _query_step(dq, q, do, base, delta, k_desc, v_desc, first_k + key, column, query, key, keys, bias, row,
                         draw, keep_scale, V, False, BLOCK_N)
    for step in range(0, whole - start + stop - partial, BLOCK_N):
        key = masked_block(step, start, whole, partial)
        dq = _query_step(dq, q, do, base, delta, k_desc, v_desc, first_k + key, column, query, key, keys, bias, row,
                         draw, keep_scale, V, True, BLOCK_N)
    # fmt: on
    at = ((first_q + m).to(tl.int64) * heads + head)[:, None] * head_dim + dim[None, :]
    inside = (m < queries)[:, None] & (dim < head_dim)[None, :]
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


def attention_backward(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), with the shapes and dtypes of the call's tensors.

    Args:
        out, lse: from `attention_forward`; in ring attention the combined ones over all parts of the keys.
        dout: [tokens, heads, head_dim], contiguous; dlse: [heads, tokens] float32 contiguous, or None.
    """
    statistics = _statistics(out, lse, dout, dlse)
    fused = call.is_fused
    make, dtype = (torch.zeros, torch.float32) if fused else (torch.empty, call.q.dtype)
    dq = make(call.q.shape, dtype=dtype, device=call.q.device)
    shape, dtype = (len(call.k), *call.q.shape[1:]), call.k.dtype if call.group == 1 else torch.float32
    dk, dv = (torch.empty(shape, dtype=dtype, device=call.k.device) for _ in range(2))
    _start_keys(call, (dq, dk, dv), statistics, dout, fused)
    if not fused:
        _start_queries(call, dq, statistics, dout)
    if call.group > 1:
        dk, dv = (x.unflatten(1, (-1, call.group)).sum(2).to(call.k.dtype) for x in (dk, dv))
    return dq.to(call.q.dtype), dk, dv


def _statistics(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = out.shape
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    config = tuned("attention_statistics", out.device, "default")
    constants = {"HAS_DLSE": dlse is not None, "HEAD_DIM": triton.next_power_of_2(head_dim)}
    grid = (triton.cdiv(tokens, config["ROWS"]), heads)
    tensors = (out, dout, lse, lse if dlse is None else dlse, base, delta)
    launch(_attention_statistics, grid, *tensors, tokens, heads, head_dim, **constants, **config)
    return base, delta


def _start_keys(
    call: Call, grads: tuple[Tensor, Tensor, Tensor], statistics: tuple[Tensor, Tensor], dout: Tensor, fused: bool
) -> None:
    config = call.config("attention_backward_fused" if fused else "attention_backward_keys")
    q_desc, do_desc = (call.describe(x, config["BLOCK_M"]) for x in (call.q, dout))
    k_desc, v_desc = (call.describe(x, config["BLOCK_N"]) for x in (call.k, call.v))
    blocks = triton.cdiv(call.longest_k, config["BLOCK_N"])
    num_head_indices = call.count * call.sizes.heads
    arguments = call.arguments(blocks, num_head_indices, call.tile_group(num_head_indices))
    tensors: tuple[Any, ...] = (q_desc, k_desc, v_desc, do_desc, *grads, *statistics)
    # Where both sums of a wide head do not fit the registers, the table's SPLIT makes one pass for each.
    for part in (
        ({"DK": True, "DV": False}, {"DK": False, "DV": True})
        if config.pop("SPLIT", False)
        else ({"DK": True, "DV": True},)
    ):
        launch(
            _attention_backward_keys,
            (blocks * num_head_indices,),
            *tensors,
            *arguments,
            FUSED=fused,
            **part,
            **call.constants(),
            **config,
        )


def _start_queries(call: Call, dq: Tensor, statistics: tuple[Tensor, Tensor], dout: Tensor) -> None:
    config = call.config("attention_backward_queries")
    q_desc, do_desc = (call.describe(x, config["BLOCK_M"]) for x in (call.q, dout))
    k_desc, v_desc = (call.describe(x, config["BLOCK_N"]) for x in (call.k, call.v))
    blocks = triton.cdiv(call.longest_q, config["BLOCK_M"])
    num_head_indices = call.count * call.sizes.heads
    arguments = call.arguments(blocks, num_head_indices, call.tile_group(num_head_indices))
    tensors: tuple[Any, ...] = (q_desc, k_desc, v_desc, do_desc, dq, *statistics)
    launch(
        _attention_backward_queries, (blocks * num_head_indices,), *tensors, *arguments, **call.constants(), **config
    )
