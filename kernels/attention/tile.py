"""Device functions on one tile of scores, for the forward and backward kernels, and the order of the tiles.

Positions count the keys of a document: query m of a document has position m + keys - queries. Scores are in units of
log2(e), so that the exponential is the hardware's exp2.
"""

import triton
import triton.language as tl

from trimaran.kernels.random import keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def schedule(program: tl.tensor, blocks: tl.tensor, num_head_indices: tl.tensor, tile_group: tl.tensor) -> tl.tensor:
    """Return (block, head index) of a program; a head index counts the heads of all documents or sequences.

    Groups of `tile_group` head indices run one after the other, so that the keys and values in use stay in the
    second-level cache. Within a group the last block runs first: under a causal mask it takes longest.
    """
    per_group = blocks * tile_group
    first = program // per_group * tile_group
    size = tl.minimum(num_head_indices - first, tile_group)
    rest = program % per_group
    return blocks - 1 - rest // size, first + rest % size


@triton.jit
def extent(index: tl.tensor, starts_ptr: tl.tensor, seq: tl.tensor, V: tl.constexpr) -> tl.tensor:
    """Return (first token, number of tokens) of a document, or of a sequence without packed documents."""
    if V.documents:
        first = tl.load(starts_ptr + index)
        return first, tl.load(starts_ptr + index + 1) - first
    return index * seq, seq


@triton.jit
def slope_of(slopes_ptr: tl.tensor, head: tl.tensor, V: tl.constexpr) -> tl.tensor:
    """Return the head's ALiBi slope, 0 without ALiBi."""
    slope = 0.0
    if V.alibi:
        slope = tl.load(slopes_ptr + head)
    return slope


@triton.jit
def narrow(tile: tl.tensor, head_dim: tl.tensor, V: tl.constexpr, HEAD_DIM: tl.constexpr) -> tl.tensor:
    """Return the tile with zeros past a narrow head, where it has loaded a part of the next head."""
    if V.padded:
        tile = tl.where((tl.arange(0, HEAD_DIM) < head_dim)[None, :], tile, 0.0).to(tile.dtype)
    return tile


@triton.jit
def mask_row(
    first_row: tl.tensor, total_heads: tl.tensor, first_token: tl.tensor, head: tl.tensor, seq: tl.tensor
) -> tl.tensor:
    """Return the dropout mask's row of the document's first query, see `AttentionDropout`."""
    return first_row + (tl.cast(first_token // seq, tl.int64) * total_heads + head) * seq + first_token % seq


@triton.jit
def keep(row: tl.tensor, key: tl.tensor, draw: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Return the dropout mask of a tile [rows, BLOCK_N]; draw: (two key words, Philox blocks per row, threshold)."""
    return keep_tile(row, key, draw[0], draw[1], draw[2], draw[3], BLOCK_N)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, V: tl.constexpr) -> tl.tensor:
    """Return a b^T for tiles [rows, head_dim].

    In float32 the warps share out parts of the head: whole rows in three TF32 parts would not fit a warp's registers.
    """
    if V.precision == "tf32":
        return tl.dot(a, b.T)
    PARTS: tl.constexpr = a.shape[1] // 16
    a_parts = a.reshape(a.shape[0], PARTS, 16).permute(1, 0, 2)
    b_parts = b.reshape(b.shape[0], PARTS, 16).permute(1, 2, 0)
    return tl.sum(tl.dot(a_parts, b_parts, input_precision=V.precision), 0)


@triton.jit
def apply_softcap_alibi(
    products: tl.tensor, query: tl.tensor, key: tl.tensor, bias: tl.tensor, V: tl.constexpr
) -> tl.tensor:
    """Return (scores of query-key products, the soft cap's factor of their gradient, 1 without a cap).

    bias: (window, scale, softcap, slope).
    """
    _, scale, softcap, slope = bias
    gradient = 1.0
    if V.softcap:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), correct for infinite exp(2 x) too
        capped = 1.0 - 2.0 / (tl.exp2(products * (2.0 * LOG2E * scale / softcap)) + 1.0)
        scores = capped * (softcap * LOG2E)
        gradient = 1.0 - capped * capped
    else:
        scores = products * (scale * LOG2E)
    if V.alibi:
        scores -= slope * LOG2E * tl.abs(query - key).to(tl.float32)
    return scores, gradient


@triton.jit
def attention_mask(query: tl.tensor, key: tl.tensor, keys: tl.tensor, window: tl.tensor, V: tl.constexpr) -> tl.tensor:
    """Return whether each query attends to each key, for positions of any shapes that broadcast."""
    allowed = key < keys
    if V.causal:
        allowed = allowed & (key <= query)
    if V.window:
        allowed = allowed & (key > query - window)
        if not V.causal:
            allowed = allowed & (key < query + window)
    return allowed


@triton.jit
def key_ranges(
    first: tl.tensor,
    keys: tl.tensor,
    window: tl.tensor,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Return (start, whole, partial, stop) of the keys of the queries at positions [first, first + BLOCK_M).

    Tiles need a mask in [start, whole) and [partial, stop), none in [whole, partial). All are multiples of BLOCK_N.
    """
    stop = keys
    partial = keys // BLOCK_N * BLOCK_N
    start = 0
    whole = 0
    if V.causal:
        stop = tl.minimum(stop, tl.maximum(first + BLOCK_M, 0))
        partial = tl.minimum(partial, tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N)
    if V.window:
        start = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        if not V.causal:
            stop = tl.minimum(stop, tl.maximum(first + BLOCK_M - 1 + window, 0))
            partial = tl.minimum(partial, tl.maximum(first + window, 0) // BLOCK_N * BLOCK_N)
    stop = tl.cdiv(tl.maximum(stop, start), BLOCK_N) * BLOCK_N
    whole = tl.minimum(tl.maximum(whole, start), stop)
    return start, whole, tl.maximum(partial, whole), stop


@triton.jit
def query_ranges(
    first: tl.tensor,
    queries: tl.tensor,
    offset: tl.tensor,
    window: tl.tensor,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Return (start, whole, partial, stop) of the queries of the keys [first, first + BLOCK_N), as in `key_ranges`.

    Query m has position m + offset.
    """
    stop = queries
    partial = queries // BLOCK_M * BLOCK_M
    start = 0
    whole = 0
    nearest = first - offset  # the query at the first key's position
    if V.causal:
        start = tl.maximum(nearest, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(nearest + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
    if V.window:
        stop = tl.minimum(stop, tl.maximum(nearest + BLOCK_N - 1 + window, 0))
        partial = tl.minimum(partial, tl.maximum(nearest + window, 0) // BLOCK_M * BLOCK_M)
        if not V.causal:
            start = tl.maximum(nearest - window + 1, 0) // BLOCK_M * BLOCK_M
            whole = tl.cdiv(tl.maximum(nearest + BLOCK_N - window, 0), BLOCK_M) * BLOCK_M
    stop = tl.cdiv(tl.maximum(stop, start), BLOCK_M) * BLOCK_M
    whole = tl.minimum(tl.maximum(whole, start), stop)
    return start, whole, tl.maximum(partial, whole), stop


@triton.jit
def masked_block(at: tl.tensor, start: tl.tensor, whole: tl.tensor, partial: tl.tensor) -> tl.tensor:
    """Return element `at` of [start, whole) followed by [partial, ...): one loop covers both masked ranges."""
    return tl.where(at < whole - start, start + at, partial + at - (whole - start))
