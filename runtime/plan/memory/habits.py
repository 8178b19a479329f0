"""Bytes of the fullest rank of published software, from a case and the habits of the software. Vectorized; no torch.

Of a layer and token, in bytes of 16-bit activations (Korthikanti et al. 2022, section 4; its table 2 for h heads etc.):

    what tp doesn't cut      10 h: inputs of the norms and of the two column products, dropout masks
    what it cuts             queries, keys, values, output; the feed-forward layer's inner width
    unfused scores           5 bytes a score: softmax, dropout, its mask

The fullest rank is the first of a pipeline, which holds most microbatches, or the last, which has the logits: whichever
holds more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Array, Cases

GIB: Final = 2.0**30


@dataclass(frozen=True)
class Habits:
    """What a software holds, in bytes a parameter, beside what ZeRO shards.

    Attributes:
        parameters, optimizer: bytes a parameter.
        gradients: bytes a parameter; None: 2, or with float32 sums 6.
        fsdp: whether all three are sharded, parameters being the main copy, with whole blocks gathered; under a
            pipeline parameters stay gathered and gradients whole, which adds 2 and 4 bytes.
        dropout: whether masks are kept.
        logits: bytes of a logit, with what the loss keeps.
        layer: what a layer keeps, as a multiple of the least; fitted.
        selective: the share of it that is kept under selective recomputation of what is not scores; fitted.
        context: GiB of the device's context, libraries, buffers and an allocator's gaps; fitted.
        source: where the habits are from.
    """

    parameters: float
    gradients: float | None
    optimizer: float
    fsdp: bool
    dropout: bool
    logits: float
    layer: float
    selective: float
    context: float
    source: str


# Fitted on tests/plan/published/memory.csv: `layer`, `selective`, `logits`, `context`, and InternEvo's `optimizer`.
HABITS: Final[Mapping[str, Habits]] = {
    "megatron-2022": Habits(2, 4, 12, False, True, 6, 1, 1, 0, "Korthikanti et al. 2022: its formula, no measurement"),
    "megatron-deepspeed-2022": Habits(
        2, None, 16, False, True, 14, 2.4, 1, 9, "BigScience, nvidia-smi: ZeRO-1 with float32 gradients of the shard"
    ),
    "nanotron": Habits(2, 4, 12, False, False, 10, 1.6, 1, 0, "nanotron's benchmark: float32 gradients, ZeRO-1"),
    "torchtitan": Habits(4, 4, 8, True, False, 10, 1.5, 0.3, 10.5, "torchtitan's benchmarks, reserved memory: FSDP2"),
    "internevo": Habits(2, 2, 23, False, False, 8, 1, 1, 5.5, "InternEvo's table: what it counts is not said"),
}


def habits_of(stack: str) -> Habits | None:
    """Return the habits of a software, or of the family that its name begins with; None: not known."""
    return next((habits for name, habits in HABITS.items() if stack.startswith(name)), None)


def rank_bytes(cases: Cases, habits: Habits) -> dict[str, Array]:
    """Return by part the bytes of the fullest pipeline rank, arrays [cases]."""
    first, last = _rank(cases, habits, is_last=False), _rank(cases, habits, is_last=True)
    fuller = sum(last.values()) > sum(first.values())
    return {name: np.where(fuller, last[name], first[name]) for name in first}


def _rank(c: Cases, habits: Habits, *, is_last: bool) -> dict[str, Array]:
    layers = c.last_layers if is_last else c.first_layers
    layer = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + (2 + c.gated) * c.hidden * c.ffn
    table = c.vocab * c.hidden
    alone = np.where(c.pp == 1, table * np.where(c.tied > 0, 1.0, 2.0), table)
    held = (layers * layer + alone) / c.tp
    group = c.dp * c.cp
    shard = np.where(c.zero > 0, group, 1.0)
    # float32 sums are kept beside the 16-bit gradients
    own = np.where(c.gradient_bytes > 2, c.gradient_bytes + 2, 2.0)
    gradients = own if habits.gradients is None else np.full_like(held, habits.gradients)
    blocks = 4.0 * np.maximum(layer, table) / c.tp
    gathered = np.where(c.pp > 1, 6.0 * held, blocks) * ((c.zero >= 3) | habits.fsdp)
    parts = {
        "parameters": habits.parameters * held / np.where((c.zero >= 3) | habits.fsdp, group, 1.0),
        "gradients": gradients * held / np.where((c.zero >= 2) | habits.fsdp, group, 1.0),
        "optimizer": habits.optimizer * held / shard,
        "gathered": gathered,
    }
    flight = np.where(is_last | (c.pp == 1), 1.0, _in_flight(c))
    kept = flight * layers * saved(c, habits) + c.recompute * _work(c, habits)
    parts["activations"] = kept
    tokens = c.microbatch * c.seq / c.cp
    has_logits = np.where(is_last | (c.pp == 1), 1.0, 0.0)
    parts["logits"] = has_logits * habits.logits * tokens * c.vocab / c.tp
    parts["context"] = np.full_like(held, habits.context * GIB)
    return parts


def _in_flight(c: Cases) -> Array:
    """Return the most microbatches that the first rank holds: 1F1B p; interleaved p (1 + (p - 1)/(p v))."""
    most = np.where(c.virtual_stages > 1, c.pp * (1 + (c.pp - 1) / (c.pp * c.virtual_stages)), c.pp)
    return np.minimum(most, c.microbatches)


def saved(c: Cases, habits: Habits) -> Array:
    """Return the bytes that a layer keeps of a microbatch for its backward pass."""
    inputs = 2.0 * c.hidden / np.where(c.sequence_parallel > 0, c.tp, 1.0)
    kept = _all(c, habits) * np.where((c.selective > 0) & (c.unfused == 0), habits.selective, 1.0)
    return np.asarray(np.where(c.recompute > 0, inputs, kept) * c.microbatch * c.seq / c.cp)


def _all(c: Cases, habits: Habits) -> Array:
    """Bytes a token of everything that a layer's backward pass reads."""
    masks = 2.0 if habits.dropout else 0.0
    stream = (8.0 + masks) * c.hidden / np.where(c.sequence_parallel > 0, c.tp, 1.0)
    heads, keys = c.heads * c.head_dim, np.maximum(c.kv_heads, np.minimum(c.tp, c.heads)) * c.head_dim
    cut = 2.0 * (2 * heads + 2 * keys) + 2.0 * (2 + c.gated) * c.ffn
    scores = np.where((c.unfused > 0) & (c.selective == 0), 5.0 * c.heads * c.seq, 0.0)
    return np.asarray(habits.layer * (stream + cut / c.tp) + scores / c.tp)


def _work(c: Cases, habits: Habits) -> Array:
    """Bytes of the one layer that is computed again, with its scores, and of its gradients, half as large."""
    return 1.5 * _all(c, habits) * c.microbatch * c.seq / c.cp
