"""What several ranks hold stays the same to the bit: whole parameters over tp, the ends of a tied embedding over pp."""

from typing import Any

import pytest
import torch

from tests.distributed.parity import GPT, Layout, make_batches, make_spec
from tests.distributed.ranks import RankPool
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.train.train_context import build_train_context, train_step

NUM_STEPS = 6
LAYOUTS = [
    Layout("tp2-pp2", {"tp": 2, "pp": 2}, GPT, dtype="float32"),
    Layout(
        "tp2-pp2-dp2-sequence-parallel", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT, dtype="bfloat16"
    ),
    Layout(
        "tp2-pp2-dp2-ep2",
        {"tp": 2, "pp": 2, "dp": 2, "ep": 2},
        GPT | {"num_experts": 4, "mlp_bias": False},
        dtype="float32",
    ),
]
State = dict[str, tuple[torch.Tensor, ...]]


def states_on_rank(layout: Layout) -> tuple[State, State]:
    """Train; return weight and moments of what every tp rank holds whole, and of the tied embedding, by name."""
    spec = make_spec(layout)
    axes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**axes, timeout_s=100)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    for step in range(NUM_STEPS):
        train_step(train_context, make_batches(spec, step, mesh.dp.rank, mesh.dp.size), 3e-3)
    whole: State = {}
    tied: State = {}
    optimizer = train_context.optimizer
    for bucket, main, moments in zip(optimizer.buckets, optimizer._main, optimizer._rule.moments, strict=True):
        for slot, start, stop in bucket.overlaps(bucket.kept):
            part = slice(start - bucket.kept.start, stop - bucket.kept.start)
            tensors = tuple(tensor[part].clone() for tensor in (main, *moments.values()))
            if slot.info.shard.axis is None:
                whole[slot.name] = tensors
            elif slot.name == "embedding.weight":
                tied[slot.name] = tensors
    mesh.close()
    return whole, tied


def assert_equal_bits(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name, tensors in a.items():
        for mine, theirs in zip(tensors, b[name], strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_replicas_stay_equal_to_the_bit(layout: Layout, ranks: RankPool) -> None:
    sizes: dict[str, Any] = layout.parallel
    tp, dp = sizes["tp"], sizes.get("dp", 1)
    found = ranks.run(states_on_rank, sizes["pp"] * dp * tp, layout)
    for stage in range(0, len(found), dp * tp):
        assert any(found[stage + rank][0] for rank in range(dp * tp)), "a stage holds norms and biases whole"
    for first in range(0, len(found), tp):  # tp is the innermost axis
        assert_equal_bits(found[first][0], found[first + 1][0])
    last_stage = (sizes["pp"] - 1) * dp * tp
    for rank in range(dp * tp):
        assert found[rank][1], "the first stage holds the embedding"
        assert_equal_bits(found[rank][1], found[last_stage + rank][1])
