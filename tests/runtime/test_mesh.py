"""The rank grid: coordinates, groups and their names on 8 gloo ranks, and 384 ranks on torch's fake backend."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.ranks import RankFailed, RankPool, session_pool
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.mesh import AXES, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import build_stages_of_rank


@pytest.fixture(scope="module")
def mesh_ranks() -> RankPool:
    """Rank processes; the fixture of tests/distributed is not seen from here."""
    return session_pool()


def describe_mesh(sizes: dict[str, int]) -> dict[str, Any]:
    """What this rank's mesh says of itself."""
    mesh = build_mesh(**sizes, timeout_s=100)
    groups = {axis: getattr(mesh, axis) for axis in (*AXES, "world")}
    description = {
        "rank": mesh.rank,
        "world_size": mesh.world_size,
        "coordinates": mesh.coordinates,
        "text": mesh.describe(),
        "ranks": {axis: group.ranks for axis, group in groups.items()},
        "indices": {axis: group.rank for axis, group in groups.items()},
        "axes": {axis: group.axis for axis, group in groups.items()},
        "has_process_group": {axis: group.process_group is not None for axis, group in groups.items()},
        "has_shared_memory": {axis: group.shared is not None for axis, group in groups.items()},
        "links": len(mesh.p2p_groups),
        "texts": mesh.gather_text(f"é{'x' * mesh.rank}"),
    }
    mesh.close()
    return description


@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 2, "dp": 2, "cp": 1, "tp": 2},
        {"pp": 1, "dp": 2, "cp": 2, "tp": 2},
        {"pp": 3, "dp": 1, "cp": 1, "tp": 2},
        {"pp": 1, "dp": 1, "cp": 1, "tp": 1},
    ],
    ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_ranks_lie_on_the_grid_with_tp_innermost(sizes: dict[str, int], mesh_ranks: RankPool) -> None:
    grid = list(itertools.product(*(range(sizes[axis]) for axis in AXES)))  # the last axis, tp, runs fastest
    assert AXES[-1] == "tp"
    results = mesh_ranks.run(describe_mesh, len(grid), sizes)
    for rank, (point, result) in enumerate(zip(grid, results, strict=True)):
        coordinates = dict(zip(AXES, point, strict=True))
        assert result["rank"] == rank
        assert result["world_size"] == len(grid)
        assert result["coordinates"] == coordinates
        assert (
            result["text"]
            == f"rank {rank} (" + ", ".join(f"{axis} {index}" for axis, index in coordinates.items()) + ")"
        )
        for axis in AXES:
            others = [grid.index(tuple((coordinates | {axis: i}).values())) for i in range(sizes[axis])]
            assert list(result["ranks"][axis]) == others
            assert result["indices"][axis] == coordinates[axis]
            assert result["axes"][axis] == axis
            assert result["has_process_group"][axis] == (sizes[axis] > 1)
            assert result["has_shared_memory"][axis] == (sizes[axis] > 1 and axis in ("tp", "dp"))
        assert result["ranks"]["world"] == tuple(range(len(grid)))
        assert result["indices"]["world"] == rank
        assert result["links"] == 0, "gloo tells directions apart by tags"
        assert result["texts"] == [f"é{'x' * other}" for other in range(len(grid))]


def expert_groups(sizes: dict[str, int]) -> dict[str, Any]:
    """Ranks, index and shared memory of this rank's groups of experts."""
    mesh = build_mesh(**sizes, timeout_s=100)
    groups = {"ep": mesh.ep, "expert_dp": mesh.expert_dp}
    found: dict[str, Any] = {
        name: (group.ranks, group.rank, group.axis, group.shared is not None) for name, group in groups.items()
    }
    found["is_dp"] = mesh.expert_dp is mesh.dp
    mesh.close()
    return found


def test_consecutive_dp_ranks_share_the_experts(mesh_ranks: RankPool) -> None:
    for rank, found in enumerate(mesh_ranks.run(expert_groups, 8, {"pp": 1, "dp": 4, "cp": 1, "tp": 2, "ep": 2})):
        dp, tp = rank // 2, rank % 2
        first = dp // 2 * 2
        assert found["ep"] == ((2 * first + tp, 2 * (first + 1) + tp), dp % 2, "ep", False)
        assert found["expert_dp"] == ((2 * (dp % 2) + tp, 2 * (dp % 2 + 2) + tp), dp // 2, "expert_dp", True)
    for rank, found in enumerate(mesh_ranks.run(expert_groups, 4, {"pp": 2, "dp": 2, "cp": 1, "tp": 1, "ep": 2})):
        first = rank // 2 * 2
        assert found["ep"] == ((first, first + 1), rank % 2, "ep", False)
        assert found["expert_dp"] == ((rank,), 0, "expert_dp", False)
        assert not found["is_dp"]
    for rank, found in enumerate(mesh_ranks.run(expert_groups, 2, {"pp": 1, "dp": 2, "cp": 1, "tp": 1})):
        assert found["ep"] == ((rank,), 0, "ep", False)
        assert found["is_dp"], "every dp rank has all experts"


def refuse(sizes: dict[str, int]) -> str:
    with pytest.raises(ValueError, match=r"world size|divisible by ep") as caught:
        build_mesh(**sizes, timeout_s=100)
    return str(caught.value)


def test_a_wrong_world_size_is_told_with_its_numbers(mesh_ranks: RankPool) -> None:
    expected = "pp(2) * dp(2) * cp(1) * tp(1) = 4 != world size 2; start that many ranks or change `parallel`"
    assert mesh_ranks.run(refuse, 2, {"pp": 2, "dp": 2, "cp": 1, "tp": 1}) == [expected] * 2


def test_ep_ranks_are_dp_ranks(mesh_ranks: RankPool) -> None:
    expected = "dp (2) must be divisible by ep (4), for the ep ranks are dp ranks; change `parallel`"
    assert mesh_ranks.run(refuse, 2, {"pp": 1, "dp": 2, "cp": 1, "tp": 1, "ep": 4}) == [expected] * 2


def test_a_world_that_is_larger_than_the_mesh_is_refused_too(mesh_ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match=r"pp\(1\) \* dp\(1\) \* cp\(1\) \* tp\(1\) = 1 != world size 2"):
        mesh_ranks.run(describe_mesh, 2, {"pp": 1, "dp": 1, "cp": 1, "tp": 1})


def big_spec() -> RunSpec:
    model = {
        "num_layers": 30,
        "hidden_size": 128,
        "num_heads": 16,
        "num_kv_heads": 8,
        "ffn_hidden_size": 344,
        "vocab_size": 50257,
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }
    return parse_spec(
        {
            "model": model,
            "parallel": {"tp": 8, "pp": 4, "dp": 12, "sequence_parallel": True},
            "optimizer": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 96, "micro_batch_size": 1, "seq_len": 64},
        }
    )


def describe_rank_of_384(spec: RunSpec, rank: int) -> dict[str, Any]:
    """The rank's groups and the parameters of its stage."""
    dist.init_process_group("fake", rank=rank, world_size=384, store=FakeStore())
    try:
        mesh = build_mesh(pp=4, dp=12, cp=1, tp=8, timeout_s=100)
        stages = build_stages_of_rank(spec, mesh, torch.device("meta"))
        shards = [
            (name, tuple(p.shape), info_of(p).shard)
            for stage in stages.values()
            for name, p in stage.named_parameters()
        ]
        groups = {axis: getattr(mesh, axis) for axis in ("pp", "dp", "cp", "tp", "world")}
        return {
            "coordinates": mesh.coordinates,
            "groups": {axis: list(group.ranks) for axis, group in groups.items()},
            "shared": any(group.shared for group in groups.values()),
            "layers": sorted({int(name.split(".")[1]) for name, _, _ in shards if name.startswith("layers.")}),
            "elements": {name: shard.num_real_elements(shape) for name, shape, shard in shards},
            "whole": {name: shard.axis is None for name, _, shard in shards},
        }
    finally:
        dist.destroy_process_group()


def test_384_ranks_of_tp8_pp4_dp12_hold_every_layer_once() -> None:
    replica = [pp * 96 + 5 * 8 + tp for pp in range(4) for tp in range(8)]  # dp 5
    ranks = [*replica, 0, 383]
    spec = big_spec()
    found = [describe_rank_of_384(spec, rank) for rank in ranks]
    for rank, result in zip(ranks, found, strict=True):
        pp, dp, tp = rank // 96, rank // 8 % 12, rank % 8
        assert result["coordinates"] == {"pp": pp, "dp": dp, "cp": 0, "tp": tp}
        assert result["groups"]["tp"] == [rank - tp + i for i in range(8)], "a node's eight neighbours"
        assert result["groups"]["dp"] == [pp * 96 + i * 8 + tp for i in range(12)]
        assert result["groups"]["pp"] == [i * 96 + dp * 8 + tp for i in range(4)]
        assert result["groups"]["cp"] == [rank]
        assert result["groups"]["world"] == list(range(384))
        assert not result["shared"], "only gloo ranks share memory"
    one_replica = found[: len(replica)]
    assert sorted(
        layer for result in one_replica if result["coordinates"]["tp"] == 0 for layer in result["layers"]
    ) == list(range(30))
    counted = sum(
        elements
        for result in one_replica
        for name, elements in result["elements"].items()
        if not result["whole"][name] or result["coordinates"]["tp"] == 0
    )
    assert counted == spec.transformer.num_parameters(), (
        "30 layers over 4 stages and a vocabulary of 50257 over 8 ranks are all there, once"
    )
    assert not dist.is_initialized()
