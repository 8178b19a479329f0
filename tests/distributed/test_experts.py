"""Experts train like one process at every layout: whole or cut, on one rank or several, with and without balance loss.

And what carries them: the exchange of rows between the ranks that share experts.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.parity import (
    GPT,
    LLAMA,
    Layout,
    assert_all_train_like_one_process,
    by_world_size,
    full,
    make_batches,
    make_spec,
)
from tests.distributed.ranks import RankPool
from trimaran.models.layers.experts import ExpertMLP
from trimaran.models.parallel import group as group_module
from trimaran.models.parallel.collectives import all_to_all
from trimaran.models.parallel.group import Group, single
from trimaran.models.parallel.parameter import LayerContext, info_of, initialize
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.train.train_context import build_train_context, train_step

MIXTRAL: dict[str, Any] = LLAMA | {"num_experts": 8, "experts_per_token": 2}
BALANCED = MIXTRAL | {"router_aux_loss": 0.5}
# Experts without a gate, one layer without a bias of its own, weights that do not add up to 1, and one expert that
# stands alone at times.
SWITCH: dict[str, Any] = GPT | {
    "num_experts": 4, "experts_per_token": 1, "renormalize_experts": False, "mlp_bias": False,
    "router_aux_loss": 0.1, "hidden_dropout": 0.1,
}  # fmt: skip
# As many experts a token as no power of two, and an inner width that tp does not divide: shared experts stay whole.
ODD = BALANCED | {"num_experts": 12, "experts_per_token": 5, "ffn_hidden_size": 23}

LAYOUTS = full(
    [
        Layout("dp2", {"dp": 2}, BALANCED),
        Layout("dp2-ep2-without-shared-memory", {"dp": 2, "ep": 2}, BALANCED, shared_memory=False),
        Layout("dp4-ep2", {"dp": 4, "ep": 2}, BALANCED),
        Layout("dp4-ep2-zero0", {"dp": 4, "ep": 2}, BALANCED, zero_stage=0),
        Layout("dp4-ep4", {"dp": 4, "ep": 4}, MIXTRAL),
        Layout("tp2-dp2-ep2", {"tp": 2, "dp": 2, "ep": 2}, BALANCED),
        Layout("tp2-dp2-ep2-sequence-parallel", {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}, BALANCED),
        Layout("tp2-dp2-ep2-odd", {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}, ODD, zero_stage=0),
        Layout("tp2-pp2-dp2-ep2", {"tp": 2, "pp": 2, "dp": 2, "ep": 2}, BALANCED),
        Layout(
            "tp2-pp2-dp2-ep2-interleaved",
            {
                "tp": 2,
                "pp": 2,
                "dp": 2,
                "ep": 2,
                "virtual_stages": 2,
                "schedule": "interleaved_1f1b",
                "sequence_parallel": True,
            },
            BALANCED,
        ),
        Layout("tp2-pp2-dp2-switch", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, SWITCH),
        Layout("tp2-dp4-ep2-switch", {"tp": 2, "dp": 4, "ep": 2}, SWITCH),
    ],
    ["tp2-dp2-ep2-odd"],
)
BATCHES = by_world_size(LAYOUTS)


@pytest.mark.parametrize("batch", BATCHES)
def test_experts_train_like_one_process(batch: str, ranks: RankPool) -> None:
    assert_all_train_like_one_process(BATCHES[batch], ranks)


# ---------------------------------------------------------------- the exchange

# [from][to] -> rows
TABLES = {
    "even": [[2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "uneven": [[1, 4, 2], [3, 0, 1], [0, 5, 6]],
    "all-to-one": [[0, 7, 0], [0, 1, 0], [0, 3, 0]],
    "one-has-none": [[0, 0, 0], [4, 1, 2], [2, 3, 1]],
    "none": [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}
WAYS = ("gloo", "all_to_all_single")
TIMEOUT_S = 8.0  # of the making of the groups too


def rows_between(source: int, target: int, count: int) -> Tensor:
    """The rows that one rank sends another: each says where it is from, where it goes and which it is."""
    return torch.tensor([[source, target, index] for index in range(count)], dtype=torch.float64).view(count, 3)


def exchange_on_rank(name: str, way: str) -> None:
    """Send rows there and back; their gradients come back from where they went."""
    rank, table = dist.get_rank(), TABLES[name]
    group = Group("ep", (0, 1, 2), rank, dist.group.WORLD)
    sent, received = table[rank], [row[rank] for row in table]
    x = torch.cat([rows_between(rank, target, count) for target, count in enumerate(sent)]).requires_grad_()
    # On NCCL it is torch's own collective, which gloo happens to have too.
    with mock.patch.object(Group, "on_gloo", way == "gloo"):
        y = all_to_all(x, sent, received, group)
        assert y.equal(torch.cat([rows_between(source, rank, count) for source, count in enumerate(received)]))
        assert group_module.all_to_all(y.detach(), received, sent, group).equal(x), "there and back"
        (y * (10.0 + rank)).sum().backward()
    targets = torch.cat(
        [torch.full((count, 3), 10.0 + target, dtype=torch.float64) for target, count in enumerate(sent)]
    )
    assert x.grad is not None
    assert x.grad.equal(targets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TABLES)
def test_rows_arrive_in_the_order_of_the_ranks_and_gradients_go_back(name: str, way: str, ranks: RankPool) -> None:
    ranks.run(exchange_on_rank, 3, name, way)


def wait_in_vain() -> str:
    """Rank 1 never sends what rank 0 waits for."""
    mesh = build_mesh(pp=1, dp=2, cp=1, tp=1, ep=2, timeout_s=TIMEOUT_S, shared_memory=False)
    if mesh.rank == 1:
        dist.barrier()  # a group of its own: this rank keeps the others until rank 0 has seen its error
        return ""
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        group_module.all_to_all(torch.zeros(3, 2), [1, 2], [1, 1], mesh.ep)
    assert time.monotonic() - start < 20 * TIMEOUT_S, "the wait is bounded by timeout_s"
    dist.barrier()
    return str(caught.value)


def test_a_wait_for_rows_is_bounded_and_names_the_peer(ranks: RankPool) -> None:
    assert ranks.run(wait_in_vain, 2)[0].startswith("rank 0 waits for ep peers 1 in an exchange of")


# ---------------------------------------------------------------- one layer


def run_layer(grid: dict[str, int], sequence_parallel: bool, lopsided: bool) -> list[tuple[str, float]]:
    """Each dp rank has tokens of its own: compare outputs and gradients with the whole layer on this rank.

    Returns: (parameter, largest difference of its gradient from that of all ranks' tokens).
    """
    mesh = build_mesh(pp=1, dp=grid["dp"], cp=1, tp=grid["tp"], ep=grid["ep"], timeout_s=100)
    config = make_spec(Layout("", {}, BALANCED)).transformer
    cpu = torch.device("cpu")
    whole = ExpertMLP(config, LayerContext(single("tp"), False, torch.float64, cpu))
    cut = ExpertMLP(config, LayerContext(mesh.tp, sequence_parallel, torch.float64, cpu, ep=mesh.ep))
    for module in (whole, cut):
        initialize(module, seed=11)
    xs = [
        torch.randn(2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in range(mesh.dp.size)
    ]
    if lopsided:  # all tokens of all ranks to two of the experts, which one rank has
        for module in (whole, cut):
            with torch.no_grad():
                module.router.weight[:2] = 5.0
                module.router.weight[2:] = -5.0
        xs = [x.abs() for x in xs]
    local: Callable[[Tensor], Tensor] = (
        (lambda t: t.chunk(mesh.tp.size, dim=1)[mesh.tp.rank]) if sequence_parallel else (lambda t: t)
    )
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs = [whole(x, 0.25) for x in inputs]
    for y in outputs:
        (y * y).sum().backward()
    x = local(xs[mesh.dp.rank]).clone().requires_grad_()
    y = cut(x, 0.25)
    torch.testing.assert_close(y, local(outputs[mesh.dp.rank]), rtol=0, atol=1e-12)
    (y * y).sum().backward()
    expected = inputs[mesh.dp.rank].grad
    assert x.grad is not None
    assert expected is not None
    torch.testing.assert_close(x.grad, local(expected), rtol=0, atol=1e-11)
    differences = []
    for (name, parameter), truth in zip(cut.named_parameters(), whole.parameters(), strict=True):
        info, gradient = info_of(parameter), parameter.grad
        assert gradient is not None
        assert truth.grad is not None
        group = mesh.expert_dp if info.shard.axis == "ep" else mesh.dp
        for other in [group] + ([mesh.tp] if info.needs_tp_grad_reduce else []):
            if other.size > 1:
                dist.all_reduce(gradient, group=other.process_group)
        part = (
            truth.grad
            if info.shard.dim is None
            else truth.grad.narrow(info.shard.dim, info.shard.offset, parameter.shape[info.shard.dim])
        )
        differences.append((name, float((gradient - part).abs().max())))
    mesh.close()
    return differences


@pytest.mark.parametrize("lopsided", [False, True], ids=["spread", "all-to-one-rank"])
@pytest.mark.parametrize(
    ("grid", "sequence_parallel"),
    [
        ({"dp": 2, "tp": 1, "ep": 2}, False),
        ({"dp": 2, "tp": 2, "ep": 2}, True),
        ({"dp": 4, "tp": 2, "ep": 2}, False),
        ({"dp": 1, "tp": 2, "ep": 1}, True),
    ],
    ids=["dp2-ep2", "tp2-dp2-ep2-sequence-parallel", "tp2-dp4-ep2", "tp2-sequence-parallel"],
)
def test_a_layer_equals_the_whole_one_also_where_ranks_have_nothing_to_do(
    grid: dict[str, int], sequence_parallel: bool, lopsided: bool, ranks: RankPool
) -> None:
    for differences in ranks.run(run_layer, grid["dp"] * grid["tp"], grid, sequence_parallel, lopsided):
        assert [name for name, _ in differences] == ["router.weight", "experts.up", "experts.down"]
        assert all(difference < 1e-11 for _, difference in differences), differences


# ---------------------------------------------------------------- what is held and what is reported


def hold_and_report(layout: Layout) -> tuple[dict[str, int], float | None, float]:
    """(parameter -> elements here, the experts' balance in a step, the gradient norm)."""
    spec = make_spec(layout)
    parallel = spec.parallel
    mesh = build_mesh(pp=parallel.pp, dp=parallel.dp, cp=1, tp=parallel.tp, ep=parallel.ep, timeout_s=100)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    held = {
        name: parameter.numel()
        for stage in train_context.stages.values()
        for name, parameter in stage.named_parameters()
    }
    result = train_step(train_context, make_batches(spec, 0, mesh.dp.rank, mesh.dp.size), 3e-3)
    others = [bucket for bucket in train_context.optimizer.buckets if bucket.sharding is not mesh.sharding]
    assert bool(others) == (parallel.ep > 1)
    mesh.close()
    return held, result.load_balancing_loss, result.grad_norm


def test_experts_are_shared_out_and_their_balance_is_the_same_at_every_layout(ranks: RankPool) -> None:
    ((whole, balance, norm),) = ranks.run(hold_and_report, 1, Layout("single", {}, BALANCED))
    assert balance is not None
    assert 1.0 < balance < 2.0
    for parallel in ({"tp": 2, "dp": 2, "ep": 2}, {"pp": 2, "dp": 2}):
        results = ranks.run(hold_and_report, 4, Layout("", parallel, BALANCED))
        for held, found, same_norm in results:
            assert found == pytest.approx(balance, rel=1e-12)
            assert same_norm == pytest.approx(norm, rel=1e-12)
            for name, count in held.items():
                if "experts" in name:
                    assert count * parallel.get("ep", 1) * parallel.get("tp", 1) == whole[name]


def test_a_model_without_experts_reports_no_balance(ranks: RankPool) -> None:
    assert ranks.run(hold_and_report, 1, Layout("single", {}, LLAMA))[0][1] is None
