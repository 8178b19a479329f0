"""Seconds of a training step, from shapes, a layout and twelve constants. Vectorized over cases; no torch.

A stage's forward and backward of a microbatch are the sum, over its layers, of matrix products, attention, what is
bound by memory, and collectives over tp; where the host takes longer to launch a stage, its time. The step is the
pipeline's makespan, then what of dp's collectives is not hidden, and the optimizer.

    product M x N x K      2 M N K / (peak x gemm x waves x alignment x K / (K + K0)), at least its bytes / HBM
    fused attention        half of 4 s h a token, and 2.5 times that backward, at its own share of the peak
    unfused                products at head_dim deep, and 13 + 17 bytes a score (Korthikanti et al. 2022)
    pipeline               m x slowest + (the others) / v  (Narayanan et al. 2021, section 2.2)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trimaran.runtime.plan.cases import Array, Cases
from trimaran.runtime.plan.time.constants import Constants

_TILE_ROWS, _TILE_COLUMNS = 128.0, 128.0
_ALIGNMENT: Final = 64.0
_MISALIGNED: Final = 0.78  # what a product keeps of its speed where a size after the cut is no multiple of 64
_BYTES: Final = 2.0  # of an activation
_SCORE_FORWARD, _SCORE_BACKWARD = 13.0, 17.0
_UPDATE_BYTES: Final = 34.0  # of AdamW: reads gradient, moments, main copy; writes the latter and the parameter
_LOSS_BYTES: Final = 24.0  # of a logit, forward and backward
_UNFUSED_LOSS_BYTES: Final = 90.0  # where each of the loss's operations reads and writes float32 logits


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, arrays [cases]; `parts` add up to `total`.

    Attributes:
        layer, head, transfer: of one microbatch, forward and backward: through a layer, through the head and its loss,
            and from a pipeline rank's stages to the next ones.
        host: of one layer, or of the head: what the host takes to launch it.
        tail: after the pipeline.
        host_bound: whether the host takes longer than the chip.
    """

    total: Array
    parts: Mapping[str, Array]
    layer: Array
    head: Array
    transfer: Array
    host: Array
    tail: Array
    host_bound: NDArray[np.bool_]


def step_time(cases: Cases, constants: Constants) -> StepTime:
    """Return what a step takes."""
    layer = _Layer(cases, constants)
    passes = 3.0 + cases.recompute
    parts = {
        "products": layer.products,
        "attention": layer.attention,
        "memory-bound": layer.memory_bound,
        "tensor-parallel": layer.tensor_parallel,
        "context-parallel": layer.context_parallel,
        "experts' exchange": layer.experts,
        "sharded state": _sharded(cases, constants, layer.compute / passes),
    }
    of_layer = np.asarray(sum(parts.values()))
    head, transfer = _head(cases, constants), _transfer(cases, constants)
    layers_of_last = np.where(cases.pp > 1, cases.last_layers, cases.layers)
    ordinary, last = cases.most_layers * of_layer, layers_of_last * of_layer + head
    # The head, its loss and the embedding are launched like a layer.
    host = constants.host * passes
    host_ordinary, host_last = cases.most_layers * host, (layers_of_last + 1) * host
    alone = np.maximum(ordinary, last)
    slowest = np.maximum(alone, np.maximum(np.where(cases.pp > 1, host_ordinary, 0.0), host_last))
    host_bound = slowest > alone
    whole = np.maximum(cases.layers * of_layer + head, (cases.layers + 1) * host) + cases.pp * transfer
    slowest = slowest + transfer
    others = np.maximum(0.0, whole - slowest)
    pipelined = cases.microbatches * slowest + others / cases.virtual_stages
    backward = slowest * 2 / passes
    exposed, update = _data_parallel(cases, constants, backward), _update(cases, constants)
    share = {name: value * cases.most_layers * cases.microbatches for name, value in parts.items()}
    share["host"] = (slowest - transfer - alone) * cases.microbatches
    share["head and loss"] = (alone - ordinary) * cases.microbatches
    share["transfers"] = transfer * cases.microbatches
    share["bubble"] = pipelined - sum(share.values())
    share["data-parallel"], share["optimizer"] = exposed, update
    tail = exposed + update
    return StepTime(pipelined + tail, share, of_layer, head, transfer, host, tail, host_bound)


class _Layer:
    """Seconds of a layer and microbatch, forward and backward, by what they go to: arrays [cases]."""

    def __init__(self, c: Cases, k: Constants) -> None:
        self._c, self._k = c, k
        tokens = c.microbatch * c.seq / c.cp
        self._tokens, self._again = tokens, c.recompute
        self.products = self._products()
        self.attention = self._attention()
        self.memory_bound = self._memory_bound()
        self.compute = self.products + self.attention + self.memory_bound
        self.tensor_parallel = self._tensor_parallel()
        self.context_parallel = self._context_parallel()
        self.experts = self._experts()

    def _products(self) -> Array:
        c, k, tokens = self._c, self._k, self._tokens
        kv = np.maximum(c.kv_heads, np.minimum(c.tp, c.heads)) * c.head_dim / c.tp
        q, inner = c.heads * c.head_dim / c.tp, c.ffn / c.tp
        rows = tokens * np.where(c.experts > 0, c.experts_per_token, 1.0)
        shapes = [
            (tokens, q + 2 * kv, c.hidden),
            (tokens, c.hidden, q),
            (rows, (1 + c.gated) * inner, c.hidden),
            (rows, c.hidden, inner),
        ]
        return np.asarray(sum(trained_product(c, k, *shape, again=self._again) for shape in shapes))

    def _attention(self) -> Array:
        c, k, tokens = self._c, self._k, self._tokens
        heads = c.heads / c.tp
        flops = 4.0 * tokens * c.seq * heads * c.head_dim
        passes = 3.5 + np.maximum(c.recompute, 0.0)
        fused = flops / 2 * passes / (c.flops * k.attention)
        depth = c.head_dim / (c.head_dim + k.half_depth)
        aligned = np.where(c.head_dim % 8 == 0, 1.0, _MISALIGNED)
        again = np.maximum(c.recompute, c.selective)
        products = flops * (3.0 + again) / (c.flops * k.gemm * depth * aligned)
        scores = tokens * c.seq * heads * (_SCORE_FORWARD * (1 + again) + _SCORE_BACKWARD)
        unfused = products + scores * k.traffic / (c.memory_rate * k.hbm)
        return np.where(c.unfused > 0, unfused, fused)

    def _memory_bound(self) -> Array:
        """Norms, residual sums, activation function, rotation: 2 bytes a number, read and written."""
        c, k, tokens = self._c, self._k, self._tokens
        cut = np.where(c.sequence_parallel > 0, c.tp, 1.0)
        rows = np.where(c.experts > 0, c.experts_per_token, 1.0)
        stream = (4.0 + 2.0 * c.reductions) * c.hidden / cut
        inner = ((2.0 + c.gated) * c.ffn * rows + 4.0 * c.heads * c.head_dim) / c.tp
        passes = 2.5 + self._again
        # Beside fused attention what is computed again selectively is norms and activation functions.
        cheap = (4.0 * c.hidden / cut + (2.0 + c.gated) * rows * c.ffn / c.tp) * c.selective * (c.unfused == 0)
        moved = tokens * ((stream + inner) * passes + cheap) * _BYTES
        return np.asarray(moved * k.traffic / (c.memory_rate * k.hbm))

    def _tensor_parallel(self) -> Array:
        c, k = self._c, self._k
        size = self._tokens * c.hidden * _BYTES
        seconds = collective(c, k, size, c.tp, np.ones_like(c.tp))
        count = np.where(c.tp > 1, c.reductions * (1.0 + 0.5 * self._again), 0.0)
        return count * (seconds * 2.0 * (1 - k.hidden_tp) + k.link_latency * (c.tp - 1))

    def _context_parallel(self) -> Array:
        """A ring of keys and values beside attention."""
        c, k = self._c, self._k
        size = self._tokens * 2 * c.kv_heads * c.head_dim / np.minimum(c.tp, c.kv_heads) * _BYTES * c.cp
        ring = collective(c, k, size, c.cp, c.tp)
        return np.where(c.cp > 1, np.maximum(0.0, (3.0 + self._again) * ring - self.attention), 0.0)

    def _experts(self) -> Array:
        c, k = self._c, self._k
        size = self._tokens * c.experts_per_token * c.hidden * _BYTES / c.tp
        seconds = collective(c, k, size, c.ep, c.tp * c.cp) + k.link_latency
        return np.where(c.ep > 1, (4.0 + 2.0 * self._again) * seconds, 0.0)


def product(c: Cases, k: Constants, m: Array, n: Array, depth: Array) -> Array:
    """Return the seconds of a matrix product [m, depth] x [depth, n] in 16 bits."""
    tiles = np.ceil(m / _TILE_ROWS) * np.ceil(n / _TILE_COLUMNS)
    waves = tiles / (np.ceil(tiles / c.processors) * c.processors)
    filled = m * n / (tiles * _TILE_ROWS * _TILE_COLUMNS)
    aligned = np.where((n % _ALIGNMENT == 0) & (depth % _ALIGNMENT == 0), 1.0, _MISALIGNED)
    rate = c.flops * k.gemm * waves * filled * aligned * depth / (depth + k.half_depth)
    moved = (m * n + m * depth + n * depth) * _BYTES / (c.memory_rate * k.hbm)
    return np.maximum(2.0 * m * n * depth / rate, moved)


def trained_product(c: Cases, k: Constants, m: Array, n: Array, depth: Array, *, again: Array) -> Array:
    """Return the seconds of a layer's product and of its two gradients; of the forward `again` times more."""
    forward = product(c, k, m, n, depth)
    return forward * (1 + again) + product(c, k, m, depth, n) + product(c, k, n, depth, m)


def collective(c: Cases, k: Constants, size: Array, group: Array, stride: Array) -> Array:
    """Return the seconds in which all ranks of a group gather, or reduce and scatter, `size` bytes.

    A ring's slowest hop counts: beyond a node that of the network cards, which the groups of a node share.

    Args:
        stride: ranks between two neighbours of the group.
    """
    inside = np.clip(c.gpus_per_node / stride, 1.0, np.maximum(group, 1.0))  # ranks of the group in one node
    across = np.minimum(c.nic_rate * k.nic * inside, c.link_rate * k.link)
    rate = np.where(group > inside, across, c.link_rate * k.link)
    return np.asarray((group - 1) / group * size / rate)


def _head(c: Cases, k: Constants) -> Array:
    tokens, rows = c.microbatch * c.seq / c.cp, np.ceil(c.vocab / (128 * c.tp)) * 128
    none = np.zeros_like(tokens)
    loss_bytes = np.where(c.unfused > 0, _UNFUSED_LOSS_BYTES, _LOSS_BYTES)
    loss = tokens * rows * loss_bytes * k.traffic / (c.memory_rate * k.hbm)
    return np.asarray(trained_product(c, k, tokens, rows, c.hidden, again=none) + loss)


def _transfer(c: Cases, k: Constants) -> Array:
    """Seconds in which a rank hands a microbatch on, forward and backward."""
    size = c.microbatch * c.seq / c.cp * c.hidden * _BYTES / c.tp
    beyond = c.tp * c.cp * c.dp >= c.gpus_per_node
    rate = np.where(beyond, c.nic_rate * k.nic, c.link_rate * k.link)
    return np.where(c.pp > 1, 2.0 * c.virtual_stages * (size / rate + k.link_latency), 0.0)


def parameters_of_rank(c: Cases) -> Array:
    """Return the parameters of the fullest pipeline rank, over tp."""
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    inner = (2 + c.gated) * c.hidden * c.ffn * np.where(c.experts > 0, c.experts / c.ep, 1.0)
    table = c.vocab * c.hidden
    ends = np.where(c.pp > 1, table, table * np.where(c.tied > 0, 1.0, 2.0))
    return (c.most_layers * (attention + inner) + ends) / c.tp


def _data_parallel(c: Cases, k: Constants, backward: Array) -> Array:
    """Seconds of gradients' and parameters' exchange that no backward pass hides."""
    held, stride, group = parameters_of_rank(c), c.tp, c.dp * c.cp
    # Stage 2 reduces gradients with every microbatch (`_sharded`), and gathers parameters once.
    size = held * (np.where(c.zero == 2, 0.0, c.gradient_bytes) + np.where(c.zero > 0, _BYTES, c.gradient_bytes))
    seconds = np.where(group > 1, collective(c, k, size, group, stride), 0.0)
    hidden = np.where(c.overlap > 0, k.hidden_dp * backward, 0.0)
    exposed = np.maximum(0.0, seconds - hidden)
    across = np.where(c.tp * c.dp >= c.gpus_per_node, c.nic_rate * k.nic, c.link_rate * k.link)
    tied = np.where((c.tied > 0) & (c.pp > 1), c.vocab * c.hidden / c.tp * c.gradient_bytes / across, 0.0)
    return np.where(c.zero >= 3, 0.0, exposed) + k.dp_latency * (group - 1) + tied


def _sharded(c: Cases, k: Constants, forward: Array) -> Array:
    """What a layer's computation does not hide of what ZeRO sends with every microbatch.

    Stage 2 reduces the layer's gradients beside its backward pass; stage 3 gathers its parameters twice too.
    """
    experts = np.where(c.experts > 0, c.experts / c.ep, 1.0)
    attention = c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    held = c.hidden * (attention + (2 + c.gated) * c.ffn * experts) / c.tp
    size = held * (np.where(c.zero >= 3, 2 * _BYTES, 0.0) + c.gradient_bytes)
    seconds = collective(c, k, size, c.dp * c.cp, c.tp)
    beside = forward * np.where(c.zero >= 3, 3.0 + c.recompute, 2.0)
    hidden = np.where(c.overlap > 0, k.hidden_dp * beside, 0.0)
    return np.where((c.zero >= 2) & (c.dp * c.cp > 1), np.maximum(0.0, seconds - hidden), 0.0)


def _update(c: Cases, k: Constants) -> Array:
    share = np.where(c.zero > 0, c.dp, 1.0)
    return parameters_of_rank(c) / share * _UPDATE_BYTES / (c.memory_rate * k.hbm)
