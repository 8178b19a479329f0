"""Seconds of this runtime's work on processors: products, attention, layers, ends, updates, exchanges. No torch.

A processor launches nothing ahead, so that its times add up:

    product m x n x k     2 m n k / (flops x gemm x k / (k + K0)), at least its bytes, and a call
    attention             2 s (s + block) d a head where a mask is causal, for torch's kernel takes keys block by block;
                          2.5 times that backward, at its own share
    stage                 seconds of the interpreter that enters and leaves it, with whatever is at its ends
    layer                 the least bytes of norms, sums, activation function, rotation and gradients, times `traffic`;
                          and seconds of the interpreter whatever the size
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.plan.calibrate.record import Exchange, Rates

ITEM: Final = {"bfloat16": 2, "float32": 4, "float64": 8}
_KEYS: Final = 512  # that the kernel takes at once
_LOSS_ITEMS = 6  # of a logit, read and written, forward and backward
_UPDATE_ITEMS = 7  # AdamW reads parameter, gradient and moments, and writes all but the gradient
_ACCUMULATED_BYTES = 12  # of a parameter's gradient, that is added to a float32 sum


@dataclass(frozen=True)
class LayerSize:
    """What a rank computes of a layer and microbatch.

    Attributes:
        tokens: whose products it computes; own: whose norms and sums, fewer under sequence parallelism.
        queries, keys: heads times their size, on this rank; inner: the feed-forward layer's width on it.
        again: share of the forward that the backward pass repeats.
        held: parameters of the layer on this rank.
        routed: times that a token goes through the feed-forward layer: to experts.
    """

    tokens: int
    own: int
    seq: int
    hidden: int
    queries: int
    keys: int
    head_dim: int
    inner: float
    is_gated: bool
    again: float
    held: float
    routed: int = 1


def product(rates: Rates, m: float, n: float, k: float) -> float:
    """Return the seconds of a product."""
    item = ITEM[rates.dtype]
    flops = 2 * m * n * k * (k + rates.half_depth) / k / (rates.flops * rates.gemm)
    moved = (m * n + m * k + n * k) * item / (rates.memory_rate * rates.hbm)
    return max(flops, moved) + rates.call


def trained_product(rates: Rates, m: float, n: float, k: float, again: float = 0.0) -> float:
    """Return the seconds of a product and of its two gradients; of the forward `again` times more."""
    return product(rates, m, n, k) * (1 + again) + product(rates, m, k, n) + product(rates, n, k, m)


def attention(rates: Rates, tokens: float, seq: int, width: float, passes: float) -> float:
    """Return the seconds of causal attention.

    Args:
        width: heads times their size.
        passes: 1 forward, 3.5 with its backward.
    """
    flops = 4 * tokens * min(seq, (seq + _KEYS) / 2) * width * passes
    return flops / (rates.flops * rates.attention) + passes * rates.call


def layer(rates: Rates, size: LayerSize) -> dict[str, float]:
    """Return the seconds of a layer and microbatch, forward and backward, by what they go to."""
    tokens, again = size.tokens, size.again
    width = (1 + size.is_gated) * size.inner
    shapes = [
        (size.queries + 2 * size.keys, size.hidden), (size.hidden, size.queries),
        (width, size.hidden), (size.hidden, size.inner),
    ]  # fmt: skip
    rows = (tokens, tokens, tokens * size.routed, tokens * size.routed)
    products = sum(trained_product(rates, m, n, k, again) for m, (n, k) in zip(rows, shapes, strict=True))
    inner = size.routed * (width + size.inner) + 2 * (size.queries + size.keys)
    moved = size.own * 12.0 * size.hidden + tokens * inner
    bound = moved * ITEM[rates.dtype] * (2.5 + again) + _ACCUMULATED_BYTES * size.held
    return {
        "products": products,
        "attention": attention(rates, tokens, size.seq, size.queries, 3.5 + again),
        "memory-bound": bound * rates.traffic / (rates.memory_rate * rates.hbm),
        "host": rates.host * (3 + again),
    }


def ends(rates: Rates, tokens: float, rows: float, hidden: int, *, has_head: bool) -> float:
    """Return the seconds of the embedding, or of head and loss, of a microbatch, forward and backward.

    Args:
        rows: of the table on this rank.
    """
    stream, rate = rates.memory_rate * rates.hbm, ITEM[rates.dtype]
    if not has_head:
        return tokens * hidden * 4.0 * rate / stream
    loss = tokens * rows * _LOSS_ITEMS * rate * rates.traffic / stream
    grads = _ACCUMULATED_BYTES * rows * hidden / stream
    return trained_product(rates, tokens, rows, hidden) + loss + grads


def update(rates: Rates, elements: float) -> float:
    """Return the seconds of AdamW over the elements of a rank."""
    wide = max(4, ITEM[rates.dtype])
    extra = 2 * ITEM[rates.dtype] if ITEM[rates.dtype] < wide else 0
    return elements * (_UPDATE_ITEMS * wide + extra) * rates.update / (rates.memory_rate * rates.hbm)


def between(found: Sequence[Rates], threads: int) -> Rates:
    """Return the rates of ranks of `threads` threads, on a straight line of logarithms between the two measured.

    Args:
        found: of one dtype, by threads.

    Raises:
        ValueError: more threads than were measured.
    """
    if threads > found[-1].threads:
        raise ValueError(
            f"a rank has {threads} threads, and the calibration has ranks of at most {found[-1].threads}; run "
            "trimaran calibrate again while nothing else uses the cores, or set launcher.threads_per_rank to "
            f"{found[-1].threads}"
        )
    if threads <= found[0].threads:
        return found[0]
    few, many = found[0], found[-1]
    share = (threads - few.threads) / (many.threads - few.threads)
    mixed = {
        name: getattr(few, name) ** (1 - share) * getattr(many, name) ** share
        for name, value in few.model_dump().items()
        if isinstance(value, float)
    }
    return few.model_copy(update={**mixed, "threads": threads})


def exchange_of(found: Sequence[Exchange], axis: str, operation: str, ranks: int) -> Exchange | None:
    """Return the exchange, measured within a node, of the group whose size is nearest; None where there is none."""
    same = [each for each in found if (each.axis, each.operation, each.nodes) == (axis, operation, 1)]
    return min(same, key=lambda each: abs(each.ranks - ranks), default=None)


def rate_between_nodes(found: Sequence[Exchange]) -> float | None:
    """Return the bytes a second that a rank sends to another node while the others of its node do; None in one node.

    By the gathering of groups with one rank of each node: in a ring, each sends all parts but one.
    """
    rates = [
        each.rate * (each.nodes - 1) / each.nodes
        for each in found
        if (each.axis, each.operation) == ("dp", "all_gather") and 1 < each.nodes == each.ranks
    ]
    return min(rates, default=None)


def exchange_seconds(found: Exchange, size: float) -> tuple[float, float]:
    """Return the seconds of an exchange of `size` bytes, by the wall clock and by a rank's processor time."""
    return found.latency + size / found.rate, found.cpu_latency + size / found.cpu_rate


def model_step(rates: Rates, shape: Mapping[str, int]) -> float:
    """Return the seconds of a measured step's forwards and backwards, of `measure`'s small models."""
    hidden, ffn, tokens = shape["hidden"], shape["ffn"], shape["seq"] * shape["microbatch"]
    width = shape["heads"] * (hidden // shape["heads"])
    size = LayerSize(
        tokens=tokens, own=tokens, seq=shape["seq"], hidden=hidden, queries=width, keys=width,
        head_dim=hidden // shape["heads"], inner=ffn, is_gated=True, again=0.0,
        held=4 * hidden * width + 3 * hidden * ffn,
    )  # fmt: skip
    inside = rates.stage + sum(layer(rates, size).values()) * shape["layers"]
    both = [ends(rates, tokens, shape["vocab"], hidden, has_head=has_head) for has_head in (False, True)]
    return inside + sum(both)
