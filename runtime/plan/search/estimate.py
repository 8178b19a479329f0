"""What a layout takes about, for all layouts at once: which to plan exactly, and in which order. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Array, Case, Cases
from trimaran.runtime.plan.forecast import Setting, case_of
from trimaran.runtime.plan.memory.ranks import CONTEXT_BYTES
from trimaran.runtime.plan.search.layouts import Layout, spec_of
from trimaran.runtime.plan.time.step import parameters_of_rank
from trimaran.runtime.spec import RunSpec

_ITEM: Final = {"bfloat16": 2.0, "float32": 4.0, "float64": 8.0}


def cases_of(spec: RunSpec, setting: Setting, layouts: Sequence[Layout]) -> Cases:
    """Return the cases of these layouts; stages are even, with what is over in all but the last."""
    base = case_of(spec_of(spec, None), setting)
    return Cases.of(_case(base, layout, spec) for layout in layouts)


def _case(base: Case, layout: Layout, spec: RunSpec) -> Case:
    share = -(-int(base.layers) // layout.pp)
    every = layout.recompute_every
    return replace(
        base, tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.ep, virtual_stages=layout.virtual_stages,
        sequence_parallel=float(layout.sequence_parallel), microbatch=layout.microbatch, zero=layout.zero,
        recompute=1 / every if every else 0.0, selective=float(layout.recompute == "selective"), most_layers=share,
        first_layers=share, last_layers=max(0.0, base.layers - share * (layout.pp - 1)),
        batch=spec.train.global_batch_size,
    )  # fmt: skip


def estimated_bytes(c: Cases, dtype: str) -> Array:
    """Return about what the fullest rank of each layout holds; the exact count is made of the fastest."""
    held, group, item = parameters_of_rank(c), c.dp, _ITEM[dtype]
    wide = max(4.0, item)
    moments = 2 * wide + (wide if item < wide else 0.0)
    whole = ((3, item), (2, wide), (1, moments))  # from which stage on it is sharded, and bytes a parameter
    # Of experts the dp ranks that hold others share nothing.
    inner = (2 + c.gated) * c.hidden * c.ffn * np.where(c.experts > 0, c.experts / c.ep, 0.0) * c.most_layers / c.tp
    own = inner / np.maximum(1.0, group / c.ep) + (held - inner) / group
    state = sum(np.where(c.zero >= stage, own, held) * size for stage, size in whole)
    tokens = c.microbatch * c.seq
    cut = np.where(c.sequence_parallel > 0, c.tp, 1.0)
    stream = item * np.where(c.selective > 0, 2.0, 4.0) * c.hidden / cut
    heads = item * (2 * c.heads + 3 * np.maximum(c.kv_heads, np.minimum(c.tp, c.heads))) * c.head_dim / c.tp
    cut_inner = item * (1 + c.gated + np.where(c.selective > 0, 0.0, 1.0)) * c.ffn * c.experts_per_token / c.tp
    layer = tokens * (stream + heads + cut_inner)
    again = c.recompute * tokens * 2 * item * c.hidden / cut + (1 - c.recompute) * layer
    kept = np.where(c.recompute > 0, again, layer)
    most = np.where(c.virtual_stages > 1, c.pp * (1 + (c.pp - 1) / (c.pp * c.virtual_stages)), c.pp)
    flight = np.where(c.pp > 1, np.minimum(most, c.microbatches), 1.0)
    return np.asarray(state + flight * c.most_layers * kept + np.where(c.recompute > 0, layer, 0.0) + CONTEXT_BYTES)
