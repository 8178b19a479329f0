"""Attention over a key-value cache in Triton, split over the keys ("Flash-Decoding", Dao et al. 2023).

One program reads one split of the keys of one (sample, kv head). The rows of its tiles are all query heads of that kv
head times the new tokens, so it reads each element of the cache once for the whole group. With several splits each
writes its softmax-weighted mean and log-sum-exp, and a second kernel combines them:

    out = sum_s 2^(lse_s) out_s / sum_s 2^(lse_s)

Scores and log-sum-exps are in units of log2(e), for the hardware's exp2. The splits are equal parts of the sample's
actual keys within the window, computed on the device. The host only chooses the number of splits, from the capacity, so
that it never waits for the lengths.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.decode.cache import cache_capacity
from trimaran.kernels.decode.reference import check_decode
from trimaran.kernels.launch import launch, multiprocessors, tuned
from trimaran.kernels.limits import LARGEST_HEAD_DIM

_LOG2E = tl.constexpr(1.4426950408889634)
_MOST_SPLITS = 128  # about one per multiprocessor; more would only slow down the combination


@triton.jit
def _scores(
    q: tl.tensor,
    k: tl.tensor,
    scale: tl.tensor,
    slope: tl.tensor,
    distance: tl.tensor,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the scores of a tile in units of log2(e), not masked: [rows, keys] float32."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), correct for infinite exp(2 x) too
        scores = (1.0 - 2.0 / (tl.exp2(products * (scale * (2.0 * _LOG2E / SOFTCAP))) + 1.0)) * (SOFTCAP * _LOG2E)
    else:
        scores = products * (scale * _LOG2E)
    if ALIBI:
        scores -= (slope * _LOG2E)[:, None] * distance.to(tl.float32)
    return scores


@triton.jit
def _share(
    length: tl.tensor, q_len: tl.tensor, WINDOW: tl.constexpr, MIN_TILES: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """Return (start, stop) of the keys of this program's split: an equal share of those that a query attends to."""
    oldest = tl.maximum(length - q_len + 1 - WINDOW, 0) if WINDOW else 0
    tiles = tl.cdiv(length - oldest, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, tl.num_programs(1)), MIN_TILES) * BLOCK_N
    start = oldest + tl.program_id(1) * share
    return start, tl.minimum(start + share, length)


@triton.jit
def _online_softmax(
    scores: tl.tensor, v: tl.tensor, top: tl.tensor, total: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr
) -> tl.tensor:
    """Add a tile of keys to (largest score, sum of weights, weighted sum of values); return the three.

    Online softmax: Milakov and Gimelshein 2018, algorithm 3.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf: a row without a key yet
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(top - finite)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _decode_split(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    table_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    table_strides: tl.tuple,
    q_len: tl.tensor,
    kv_heads: tl.tensor,
    row_tiles: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    # Row tiles of one kv head are neighbours: they read the same keys, the second time from the cache.
    program, splits = tl.program_id(0), tl.num_programs(1)
    sample = (program // (row_tiles * kv_heads)).to(tl.int64)
    kv_head = program // row_tiles % kv_heads
    rows = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    live = rows < q_len * GROUP
    length = tl.minimum(tl.load(lengths_ptr + sample), capacity)
    query = length - q_len + token
    start, stop = _share(length, q_len, WINDOW, MIN_TILES, BLOCK_N)
    in_q = live[:, None] & (dims < HEAD_DIM)[None, :]
    q_base = q_ptr + sample * q_strides[0] + token[:, None] * q_strides[1] + head[:, None] * q_strides[2]
    q = tl.load(q_base + dims[None, :] * q_strides[3], in_q, 0.0)
    slope = tl.load(slopes_ptr + head, live, 0.0).to(tl.float32) if ALIBI else 0.0
    k_base = k_ptr + tl.cast(kv_head, tl.int64) * k_strides[2]
    v_base = v_ptr + tl.cast(kv_head, tl.int64) * v_strides[2]
    if PAGE == 0:
        k_base, v_base = k_base + sample * k_strides[0], v_base + sample * v_strides[0]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        here = key < stop
        in_kv = here[:, None] & (dims < HEAD_DIM)[None, :]
        if PAGE:
            page = tl.load(table_ptr + sample * table_strides[0] + key // PAGE * table_strides[1], here, 0).to(tl.int64)
            k_row = page * k_strides[0] + key % PAGE * k_strides[1]
            v_row = page * v_strides[0] + key % PAGE * v_strides[1]
        else:
            k_row, v_row = key.to(tl.int64) * k_strides[1], key.to(tl.int64) * v_strides[1]
        k = tl.load(k_base + k_row[:, None] + dims[None, :] * k_strides[3], in_kv, 0.0)
        distance = query[:, None] - key[None, :]
        scores = _scores(q, k, scale, slope, distance, SOFTCAP, ALIBI, PRECISION)
        seen = here[None, :] & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(v_base + v_row[:, None] + dims[None, :] * v_strides[3], in_kv, 0.0)
        top, total, acc = _online_softmax(scores, v, top, total, acc, PRECISION)

    # [row of out, split]: the partial results of one row are adjacent.
    to = ((sample * q_len + token) * (kv_heads * GROUP) + head) * splits + tl.program_id(1)
    seen_any = total != 0  # true for NaN too
    total = tl.where(seen_any, total, 1.0)
    if SPLIT:
        tl.store(lse_ptr + to, top + tl.log2(total), live)  # -inf without a key
        in_q = in_q & seen_any[:, None]  # _decode_combine does not read the rest
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + to[:, None] * HEAD_DIM + dims[None, :], out, in_q)


@triton.jit
def _decode_combine(
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        lse = tl.load(lse_ptr + row * splits + split, split < splits, float("-inf"))
        filled = lse != float("-inf")
        part = tl.load(
            part_ptr + (row * splits + split)[:, None] * HEAD_DIM + dims[None, :],
            filled[:, None] & (dims < HEAD_DIM)[None, :],
            0.0,
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = tl.exp2(lse - finite), tl.exp2(top - finite)
        acc = acc * decay + tl.sum(weights[:, None] * part, 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), dims < HEAD_DIM)


@lru_cache(maxsize=4096)
def num_splits(programs: int, tiles: int, slots: int) -> int:
    """Return the number of splits: the smallest that keeps the chip at 85% of the best occupancy or more.

    FlashAttention's rule; occupancy is the share of the slots in use over all waves of programs.

    Args:
        programs: programs of one split.
        tiles: most splits of the longest sequence.
        slots: programs that the chip runs at once.
    """
    if programs * 5 >= slots * 4:
        return 1
    busy = {}
    for splits in range(1, max(1, min(tiles, slots, _MOST_SPLITS)) + 1):
        if splits == 1 or -(-tiles // splits) < -(-tiles // (splits - 1)):  # else some splits would be empty
            waves = programs * splits / slots
            busy[splits] = waves / -(-programs * splits // slots)
    return next(splits for splits, share in busy.items() if share >= 0.85 * max(busy.values()))


def _configuration(q: Tensor, rows: int, paged: bool) -> dict[str, int]:
    """Return the tuned configuration for `rows` rows of a kv head: narrow tiles where the rows fit, else wide ones."""
    width = f"d{max(16, triton.next_power_of_2(q.shape[3]))}"
    suffix = "_float32" if q.dtype == torch.float32 else ""
    config = tuned("decode", q.device, f"narrow_{width}{suffix}")
    if rows > config["BLOCK_M"]:  # wide tiles of float32 would spill, so the table has only narrow ones
        config = tuned("decode", q.device, f"wide_{width}{suffix}", f"narrow_{width}{suffix}")
    stages = config.pop("PAGED_STAGES")  # prefetching the block table takes further stages
    return {**config, "num_stages": stages} if paged else config


def _precision(q: Tensor) -> str:
    if q.dtype != torch.float32:
        return "tf32"  # ignored in half precision
    return "tf32x3" if q.shape[3] <= 128 else "ieee"  # the tf32 parts of wider queries do not fit the registers


@torch.no_grad()
def triton_decode_attention(
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
    """Return the attention of each sample's last tokens over its cache, as the reference `decode_attention`.

    Raises ValueError as the reference, and for a head_dim over 256. The host does not read lengths on a device; one
    over the capacity counts as the capacity. max_length only sizes the work: a larger length gives the right result.
    """
    check_decode(q, k_cache, v_cache, lengths, block_table, window, softcap, alibi_slopes)
    batch, q_len, heads, head_dim = q.shape
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {LARGEST_HEAD_DIM} for the Triton kernel; it is {head_dim}")
    if q.numel() == 0:
        return torch.empty_like(q)
    kv_heads, capacity = k_cache.shape[2], cache_capacity(k_cache, block_table)
    rows = q_len * (heads // kv_heads)
    config: dict[str, Any] = _configuration(q, rows, block_table is not None)
    row_tiles = triton.cdiv(rows, config["BLOCK_M"])
    keys = capacity if max_length is None else min(capacity, max_length)
    keys = keys if window is None else min(keys, window + q_len - 1)
    programs, slots = batch * kv_heads * row_tiles, multiprocessors(q.device) * config.pop("PROGRAMS")
    splits = num_splits(programs, triton.cdiv(keys, config["BLOCK_N"] * config["MIN_TILES"]), slots)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = lse = out
    if splits > 1:
        part = torch.empty(*q.shape[:3], splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(*q.shape[:3], splits, dtype=torch.float32, device=q.device)
    launch(
        _decode_split,
        (programs, splits),
        *(q, k_cache, v_cache, part, lse, lengths.contiguous(), lengths if block_table is None else block_table),
        q if alibi_slopes is None else alibi_slopes.contiguous(),
        *(q.stride(), k_cache.stride(), v_cache.stride(), (0, 0) if block_table is None else block_table.stride()),
        *(q_len, kv_heads, row_tiles, capacity, head_dim**-0.5 if scale is None else scale),
        PAGE=0 if block_table is None else k_cache.shape[1],
        WINDOW=window or 0,
        SOFTCAP=float(softcap or 0.0),
        ALIBI=alibi_slopes is not None,
        SPLIT=splits > 1,
        PRECISION=_precision(q),
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        **config,
    )
    if splits > 1:
        config = tuned("decode", q.device, "combine")
        grid = (batch * q_len * heads,)
        launch(
            _decode_combine,
            grid,
            part,
            lse,
            out,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            **config,
        )
    return out
