"""The forward pass of attention in Triton.

FlashAttention-2 (Dao 2023, algorithm 1) with online softmax (Milakov and Gimelshein 2018). One program holds BLOCK_M
queries of one head and walks over their keys, BLOCK_N at a time: first the tiles that need no mask, then the others (a
window's edge, the diagonal, the document's end). Tensor descriptors load the tiles: by TMA on Hopper and later, by
plain loads before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.attention.call import NOT_SPECIALIZED, Call
from trimaran.kernels.attention.tile import (
    LN2,
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
    schedule,
    slope_of,
)
from trimaran.kernels.launch import launch


@triton.jit
def _step(
    state: tl.tensor,
    q: tl.tensor,
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
    V: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Add BLOCK_N keys to (accumulator, row maximum, row sum)."""
    acc, maximum, total = state
    scores = product(q, k_desc.load([token, column]), V)
    at = key + tl.arange(0, BLOCK_N)
    # Without cap or ALiBi the subtraction applies the scale for free: score * factor - maximum is one instruction.
    factor = bias[1] * LOG2E
    if V.softcap or V.alibi:
        scores, _ = apply_softcap_alibi(scores, query[:, None], at[None, :], bias, V)
        factor = 1.0
    if MASKED:
        scores = tl.where(attention_mask(query[:, None], at[None, :], keys, bias[0], V), scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    base = new_maximum
    if MASKED:
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no key seen yet: not inf - inf
    weights = tl.exp2(scores * factor - base[:, None])
    decay = tl.exp2(maximum - base)
    total = total * decay + tl.sum(weights, 1)
    if V.dropout:
        weights = tl.where(keep(row, key, draw, BLOCK_N), weights, 0.0)
    v = v_desc.load([token, column])
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=V.precision)
    return acc, new_maximum, total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_forward(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
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
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = block * BLOCK_M + keys - queries
    query = position + tl.arange(0, BLOCK_M)
    column = head // group * head_dim
    bias, draw = (window, scale, softcap, slope_of(slopes_ptr, head, V)), (key0, key1, mask_blocks, threshold)
    row = mask_row(first_row, total_heads, first_q, head, seq_q) + m
    dim = tl.arange(0, HEAD_DIM)
    q = narrow(q_desc.load([first_q + block * BLOCK_M, head * head_dim]), head_dim, V, HEAD_DIM)
    state = (
        tl.zeros([BLOCK_M, HEAD_DIM], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    start, whole, partial, stop = key_ranges(position, keys, window, V, BLOCK_M, BLOCK_N)
    for key in range(whole, partial, BLOCK_N):
        state = _step(
            state, q, k_desc, v_desc, first_k + key, column, query, key, keys, bias, row, draw, V, False, BLOCK_N
        )
    for step in range(0, whole - start + stop - partial, BLOCK_N):
        key = masked_block(step, start, whole, partial)
        state = _step(
            state, q, k_desc, v_desc, first_k + key, column, query, key, keys, bias, row, draw, V, True, BLOCK_N
        )
    acc, maximum, total = state
    inside = m < queries
    seen = total != 0.0  # true for NaN too, which must not count as a row without keys
    lse = tl.where(seen, (maximum + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse_ptr + tl.cast(head, tl.int64) * tokens + first_q + m, lse, mask=inside)
    acc *= (keep_scale / tl.where(seen, total, 1.0))[:, None]
    out = out_ptr + ((first_q + m).to(tl.int64) * heads + head)[:, None] * head_dim + dim[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (dim < head_dim)[None, :])


def attention_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return (out [tokens, heads, head_dim], log-sum-exp [heads, tokens] float32)."""
    tokens, heads, _ = call.q.shape
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=call.q.device)
    config = call.config("attention_forward")
    q_desc = call.describe(call.q, config["BLOCK_M"])
    k_desc, v_desc = (call.describe(x, config["BLOCK_N"]) for x in (call.k, call.v))
    blocks = triton.cdiv(call.longest_q, config["BLOCK_M"])
    num_head_indices = call.count * heads
    arguments = call.arguments(blocks, num_head_indices, call.tile_group(num_head_indices))
    launch(
        _attention_forward,
        (blocks * num_head_indices,),
        q_desc,
        k_desc,
        v_desc,
        out,
        lse,
        *arguments,
        **call.constants(),
        **config,
    )
    return out, lse
