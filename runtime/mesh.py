"""Mesh: the grid of ranks and its process groups, built once. No other code computes a rank from a rank."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trimaran.models.parallel.group import Group, all_gather, all_reduce
from trimaran.models.parallel.shared_memory import SharedMemory
from trimaran.runtime.grid import AXES, coordinates, describe_coordinates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's coordinates, its group on each axis, and `world`, the group of all ranks.

    Args:
        coordinates: axis name -> this rank's index on it.
        ep: consecutive dp ranks that share the experts between them.
        expert_dp: the dp / ep ranks that hold the same experts as this one; `dp` itself where ep is 1.
        p2p_groups: on NCCL, (source pp index, forward) -> the two-rank group of transfers from there to the next
            (forward) or previous stage. A group for each direction keeps opposite transfers from waiting for each
            other. Empty on gloo, which has tags instead.
    """

    rank: int
    world_size: int
    coordinates: dict[str, int]
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    ep: Group
    expert_dp: Group
    world: Group
    p2p_groups: dict[tuple[int, bool], Group]

    def describe(self) -> str:
        """Return this rank and its coordinates for messages, such as `rank 5 (pp 1, dp 0, cp 0, tp 1)`."""
        return f"rank {self.rank} ({describe_coordinates(self.coordinates)})"

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in rank order. Collective over the world; uses no pickle."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=device)
        lengths[self.rank] = len(data)
        all_reduce(lengths, self.world)
        sizes = lengths.tolist()
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=device)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else padded[:0]
        parts = all_gather(padded, self.world)
        return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]

    def close(self) -> None:
        """Close the shared memory of the groups; torch.distributed closes the process groups."""
        for group in (self.pp, self.dp, self.cp, self.tp, self.ep, self.expert_dp, self.world):
            if group.shared is not None:
                group.shared.close()


def build_mesh(
    *, pp: int, dp: int, cp: int, tp: int, ep: int = 1, timeout_s: float, shared_memory: bool = True
) -> Mesh:
    """Return the mesh over the default process group, whose size must be pp * dp * cp * tp.

    Collective: every rank of the world must enter.

    Args:
        ep: how many consecutive dp ranks share the experts.
        timeout_s: bound of every wait, in the process groups and in shared memory.
        shared_memory: whether CPU ranks of one host exchange tensors through shared memory.

    Raises:
        ValueError: the sizes do not multiply to the world size, or ep does not divide dp.
    """
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if pp * dp * cp * tp != world_size:
        product = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
        raise ValueError(
            f"{product} = {pp * dp * cp * tp} != world size {world_size}; start that many ranks or change `parallel`"
        )
    if dp % ep:
        raise ValueError(f"dp ({dp}) must be divisible by ep ({ep}), for the ep ranks are dp ranks; change `parallel`")
    backend = dist.get_backend()
    grid = torch.arange(world_size).view(pp, dp, cp, tp)
    maker = _GroupMaker(rank, timeout_s, shared_memory and backend == "gloo")
    groups = {axis: maker.along_dim(axis, grid, dim) for dim, axis in enumerate(AXES)}
    groups |= {"ep": Group("ep", (rank,), 0), "expert_dp": groups["dp"]}
    if ep > 1:
        experts = grid.view(pp, dp // ep, ep, cp, tp)
        groups |= {axis: maker.along_dim(axis, experts, dim) for dim, axis in ((1, "expert_dp"), (2, "ep"))}
    p2p_groups = maker.p2p_groups(grid.movedim(0, -1).reshape(-1, pp).tolist()) if backend == "nccl" and pp > 1 else {}
    world = Group("world", tuple(range(world_size)), rank, dist.group.WORLD if world_size > 1 else None)
    return Mesh(rank, world_size, coordinates(rank, sizes), **groups, world=world, p2p_groups=p2p_groups)


@dataclass(frozen=True)
class _GroupMaker:
    """Makes the process groups, in the same order on all ranks.

    DeviceMesh is not used because its groups have torch's own time-out, half an hour on gloo.
    """

    rank: int
    timeout_s: float
    shared_memory: bool

    def along_dim(self, axis: str, grid: torch.Tensor, dim: int) -> Group:
        """Make a group for every line of the grid along `dim`, which is mesh axis `axis`; return this rank's."""
        lines = grid.movedim(dim, -1).reshape(-1, grid.shape[dim])
        ranks = tuple(next(line for line in lines.tolist() if self.rank in line))
        index = ranks.index(self.rank)
        if len(ranks) == 1:
            return Group(axis, ranks, 0)
        process_group, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timedelta(seconds=self.timeout_s))
        assert process_group is not None, "every rank lies on one line of each axis"
        memory = None
        if self.shared_memory and axis in ("dp", "tp", "expert_dp"):
            names = [f"rank {other} ({axis} {position})" for position, other in enumerate(ranks)]
            memory = SharedMemory.connect(process_group, index, names, self.timeout_s)
            if memory is None and index == 0:
                logger.warning(
                    "ranks %s share no /dev/shm with room for %d MiB: their %s tensors go through gloo",
                    ranks,
                    2 * len(ranks),
                    axis,
                )
        return Group(axis, ranks, index, process_group, memory)

    def p2p_groups(self, pipelines: Sequence[Sequence[int]]) -> dict[tuple[int, bool], Group]:
        """Make the two-rank groups of every pipeline; return those of this rank's pipeline. See `Mesh.p2p_groups`."""
        p2p_groups: dict[tuple[int, bool], Group] = {}
        for ranks in pipelines:
            for source, forward in itertools.product(range(len(ranks)), (True, False)):
                destination = (source + (1 if forward else -1)) % len(ranks)
                pair = tuple(sorted((ranks[source], ranks[destination])))  # new_group sorts the ranks
                process_group = dist.new_group(list(pair), timeout=timedelta(seconds=self.timeout_s))
                if self.rank in pair:
                    p2p_groups[source, forward] = Group("pp", pair, pair.index(self.rank), process_group)
        return p2p_groups
