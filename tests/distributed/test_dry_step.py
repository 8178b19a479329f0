"""The dry step counts what real ranks hold, to the byte, and what the formulas of ZeRO and of schedules promise."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.ranks import RankPool
from trimaran.launchers.cli.planning.memory import cells, step_of
from trimaran.models.layers.experts import ExpertMLP
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.pipeline.simulate import Costs, simulate
from trimaran.runtime.spec import RunSpec, load_spec, parse_spec
from trimaran.runtime.train.checks.dry_step import StepBytes, count_step
from trimaran.runtime.train.pipeline import placement_of, schedule_of

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48, "vocab_size": 264,
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False,
}  # fmt: skip
# Odd sizes everywhere: shards and buckets are padded.
ODD: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 20, "num_heads": 4, "ffn_hidden_size": 30, "vocab_size": 263,
    "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True,
    "hidden_dropout": 0.1,
}  # fmt: skip
EXPERTS: dict[str, Any] = LLAMA | {"num_experts": 4, "experts_per_token": 2}
TP2_PP2_DP2 = {"tp": 2, "pp": 2, "dp": 2}
SEQ_LEN = 32


def spec_of(zero_stage: int, parallel: dict[str, Any], model: dict[str, Any] = LLAMA, **train: Any) -> RunSpec:
    fields = {"num_steps": 1, "global_batch_size": 6, "micro_batch_size": 1, "seq_len": SEQ_LEN, **train}
    return parse_spec(
        {
            "model": model,
            "parallel": parallel,
            "zero": {"stage": zero_stage, "bucket_size_mib": 0.01},
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "bfloat16"},
            "train": fields,
        }
    )


# ---------------------------------------------------------------- against real ranks


def real_step(spec: RunSpec) -> StepBytes:
    """What this rank really holds in a step, of microbatches of token 0."""
    parallel = spec.parallel
    mesh = build_mesh(
        pp=parallel.pp, dp=parallel.dp, cp=1, tp=parallel.tp, ep=parallel.ep, shard_size=spec.zero.shard_size,
        timeout_s=100, tied_embedding=spec.transformer.tie_embeddings, placement=placement_of(spec),
    )  # fmt: skip
    slots = [group.shared._memory for group in mesh.groups if group.shared is not None]
    try:
        with mock.patch.object(ExpertMLP, "assumes_even_split", True):
            return count_step(spec, mesh, torch.device("cpu"), outside=slots)
    finally:
        mesh.close()


REAL = {
    "zero1-1f1b-tied-padded": (spec_of(1, TP2_PP2_DP2, ODD), [1, 6]),
    "zero2-zb_h1-sequence-parallel": (
        spec_of(2, TP2_PP2_DP2 | {"schedule": "zb_h1", "sequence_parallel": True}),
        [1, 6],
    ),
    "zero3-zbv-sequence-parallel-tied-padded-recompute": (
        spec_of(
            3, TP2_PP2_DP2 | {"schedule": "zbv", "virtual_stages": 2, "sequence_parallel": True}, ODD, recompute="full"
        ),
        [1],
    ),
    "zero3-experts-selective": (spec_of(3, {"tp": 2, "dp": 2, "ep": 2}, EXPERTS, recompute="selective"), [2]),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_rank_holds_what_the_dry_step_says(name: str, ranks: RankPool) -> None:
    spec, looked_at = REAL[name]
    real = ranks.run(real_step, spec.world_size, spec)
    for rank in looked_at:
        dry, found = step_of(spec, rank, "cpu"), real[rank]
        assert dry.where == found.where
        assert dry.state == found.state
        assert dry.after == found.after
        # Token 0 is tp rank 0's. Where a mask selects rows (a CPU's embedding in the backward pass), the dry step takes
        # all of them: their indices, gradients and float32 gradients.
        slack = 0 if found.where.endswith("tp 0)") else SEQ_LEN * (8 + spec.transformer.hidden_size * (2 + 4))
        for mine, theirs in zip(dry.peaks, found.peaks, strict=True):
            assert replace(mine, activations=0) == replace(theirs, activations=0)
            more = mine.activations - theirs.activations
            assert more == 0 or (theirs.name[:2] in ("0B", "0W") and 0 < more <= slack), theirs.name
        assert sum(dry.state.values()) < dry.after < dry.total


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_and_transit_follow_the_formulas(stage: int, dp: int) -> None:
    """bfloat16: 18 bytes a parameter; 6 + 12/d; 2 + 16/d; 18/d and the transit of two buckets."""
    spec = spec_of(stage, {"dp": dp}, global_batch_size=8)
    step = step_of(spec, dp - 1, "cuda")
    count = spec.transformer.num_parameters()
    whole, sharded = {0: (18, 0), 1: (6, 12), 2: (2, 16), 3: (0, 18)}[stage]
    assert sum(step.state.values()) * dp == count * (whole * dp + sharded)
    table, norm = 264 * 32, 32
    layer = (count - 2 * table - norm) // 4
    buckets = [table, *[layer] * 4, norm, table]  # of the embedding, the layers, the final norm and the head
    buffers = 4 * 2 * table if stage >= 2 else 0
    gathered = 2 * max(map(sum, pairwise(buckets))) if stage == 3 else 0  # a block's, and meanwhile the next one's
    most = max(peak.transit for peak in step.peaks)  # at the moments of the peaks
    assert buffers < most <= buffers + gathered if stage == 3 else most == buffers
    assert 0 < step.after - sum(step.state.values()) - buffers < 4096, "step counters and the loss"


@pytest.mark.parametrize(
    ("schedule", "rank"),
    [(name, rank) for name in ("gpipe", "1f1b", "zb_h1", "zb_h2", "interleaved_1f1b") for rank in (0, 2)]
    # In a V, rank 0 also has the head, whose forward needs more than others.
    + [("zbv", 1), ("zbv", 2), ("dualpipev", 1), ("dualpipev", 2)],
)
def test_activations_grow_as_the_simulator_says(schedule: str, rank: int) -> None:
    """In units of what a forward adds, a rank holds what the simulator counts: 1F1B min(m, p - rank), GPipe m."""
    chunks = 2 if schedule in ("zbv", "dualpipev", "interleaved_1f1b") else 1
    parallel = {"pp": 4, "schedule": schedule, "virtual_stages": chunks}
    spec = spec_of(1, parallel, LLAMA | {"num_layers": 8}, global_batch_size=8)
    held = simulate(schedule_of(spec), Costs.uniform(spec.num_stages)).peak_held[rank]
    expected = {("gpipe", 0): 8, ("gpipe", 2): 8, ("1f1b", 0): 4, ("1f1b", 2): 2, ("zb_h1", 0): 4, ("zb_h2", 0): 7}
    assert held == expected.get((schedule, rank), held)
    step = step_of(spec, rank, "cuda")
    forwards = [peak.activations for peak in step.peaks if "F" in peak.name and peak.is_compute]
    assert (max(forwards) - forwards[0]) / (forwards[1] - forwards[0]) + 1 == pytest.approx(held, abs=0.3)


def test_the_memory_of_another_library_is_refused() -> None:
    spec = spec_of(1, {"dp": 2})
    other = spec.model_copy(update={"zero": spec.zero.model_copy(update={"backend": "deepspeed"})})
    with pytest.raises(ValueError, match=r"^zero.backend is deepspeed, and only .* --set zero.backend=native$"):
        step_of(other, 0, "cuda")


def test_falcon_40b_is_counted_as_results_tell() -> None:
    """TP 8 x PP 4 x DP 12: three stages of ZeRO for 8 ranks each may take five minutes on two cores."""
    spec = load_spec(ROOT / "examples" / "falcon-40b.yaml", ["zero.stage=3"])
    before = time.process_time()
    step = step_of(spec, 295, "cuda")
    assert time.process_time() - before < 2 * 300 / (3 * 8)
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert f"| 3 | 3 | {' | '.join(cells(step, step.peak))} | {step.peak.name} |" in results
