"""A mesh of several axes: bounded waits that name the peer, and pipeline links numbered as torch numbers them."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankPool
from trimaran.launchers.env.rank_env import RankEnv
from trimaran.launchers.rendezvous.store import Rendezvous
from trimaran.launchers.slurm.preflight import ring_seconds
from trimaran.models.parallel.group import all_gather_into, all_reduce, broadcast, receive
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import parse_spec

TIMEOUT_S = {"all_reduce": 2.0, "broadcast": 2.0, "exchange": 8.0, "receive": 8.0}
"""Of a wait. Sends and receives have that of their group, which bounds the making of all groups too."""


def wait_for_absent_peer(action: str) -> str:
    """Rank 0 enters a collective of its group; the others never do. Return rank 0's error."""
    late = action in ("all_reduce", "broadcast")  # their time-out can be shortened when the groups are there
    mesh = build_mesh(pp=2, dp=1, cp=1, tp=2, timeout_s=200 if late else TIMEOUT_S[action], shared_memory=False)
    message = ""
    if mesh.rank == 0:
        for group in (mesh.tp, mesh.pp) if late else ():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S[action]), group.process_group)
        start = time.monotonic()
        try:
            enter(action, mesh)
        except RuntimeError as error:
            message = str(error)
        assert time.monotonic() - start < 100, "the wait is bounded by timeout_s"
    dist.barrier()  # a group of its own: the others keep their groups until rank 0 has seen its error
    return message


def enter(action: str, mesh: Mesh) -> None:
    x = torch.zeros(4)
    match action:
        case "all_reduce":
            all_reduce(x, mesh.tp)
        case "exchange":
            all_gather_into(torch.zeros(2, 4), x, mesh.tp)
        case "receive":
            receive(x, 1, mesh.pp)
        case "broadcast":
            broadcast(x, 1, mesh.pp)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("all_reduce", "tp peers 1 in all_reduce"),
        ("exchange", "tp peers 1 in an exchange"),
        ("receive", "from rank 2"),
        ("broadcast", "pp peers 2"),
    ],
)
def test_wait_on_a_mesh_of_two_axes_is_bounded_and_names_the_peer(action: str, words: str, ranks: RankPool) -> None:
    message = ranks.run(wait_for_absent_peer, 4, action)[0]
    assert message.startswith("rank 0 waits for"), message
    assert words in message


def pass_around_nodes(num_devices: int) -> list[float]:
    """Be one node of a preflight, on a CPU in the place of each GPU."""
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    rendezvous = Rendezvous(RankEnv("slurm", rank, size, rank, size, f"n{rank}", "7"), store, "127.0.0.1")
    spec = parse_spec({
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2}, "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 16},
    })  # fmt: skip
    return ring_seconds(spec, rendezvous, [torch.device("cpu")] * num_devices)


def test_the_preflights_ring_goes_over_every_device_of_the_nodes(ranks: RankPool) -> None:
    found = ranks.run(pass_around_nodes, 3, 2)
    assert [len(seconds) for seconds in found] == [2, 2, 2]
    assert all(second > 0 for seconds in found for second in seconds)


def send_around_links() -> list[float]:
    """Send this rank's number over every link of a ring of pipeline ranks; return what came, forward then backward."""
    rank, size = dist.get_rank(), dist.get_world_size()
    p2p_groups = build_mesh(pp=size, dp=1, cp=1, tp=1, timeout_s=100.0, has_tags=False).p2p_groups
    received = []
    for forward in (True, False):
        source, target = ((rank - 1) % size, (rank + 1) % size) if forward else ((rank + 1) % size, (rank - 1) % size)
        out, into = p2p_groups[rank, target, forward], p2p_groups[source, rank, forward]
        sending = dist.isend(torch.tensor([float(rank)]), group_dst=target, group=out.process_group)
        x = torch.empty(1)
        dist.recv(x, group_src=source, group=into.process_group)
        assert sending is not None
        sending.wait()
        received.append(x.item())
    return received


@pytest.mark.parametrize("size", [2, 3, 4])
def test_links_lead_to_the_next_and_the_previous_pipeline_rank(size: int, ranks: RankPool) -> None:
    for rank, received in enumerate(ranks.run(send_around_links, size)):
        assert received == [(rank - 1) % size, (rank + 1) % size]


def meshes_in_turn() -> list[float]:
    """Make meshes with different numbers of groups one after another; return sums over the ends of their pipelines."""
    sums = []
    for pp in (3, 6, 2, 3, 1):
        mesh = build_mesh(pp=pp, dp=6 // pp, cp=1, tp=1, timeout_s=100.0)
        sums.append(all_reduce(torch.tensor(float(mesh.rank)), mesh.embedding).item())
        mesh.close()
    return sums


def test_the_ends_of_each_pipeline_have_a_group(ranks: RankPool) -> None:
    """Ranks between the ends make another group in its place: all ranks must have made the same number before."""
    for rank, found in enumerate(ranks.run(meshes_in_turn, 6)):
        ends = {pp: (rank % (6 // pp), rank % (6 // pp) + (pp - 1) * (6 // pp)) for pp in (3, 6, 2)}
        sums = {pp: float(sum(pair) if rank in pair else rank) for pp, pair in ends.items()}
        assert found == [sums[3], sums[6], sums[2], sums[3], float(rank)]
