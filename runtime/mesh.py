"""Mesh: the grid of ranks and its groups, built once. Nobody else computes a rank from a rank."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from trimaran.models.parallel.group import Group
from trimaran.models.parallel.shared_memory import SharedMemory

AXES = ("pp", "dp", "cp", "tp")
"""Outermost to innermost: tp ranks are neighbours, so they stay inside a node."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's coordinates and the groups through it, one an axis, and `world` of all ranks.

    Args:
        coordinates: axis name -> this rank's index on it.
        links: on NCCL, (source pp index, forward) -> the two-rank group of the transfers from there to the next (forward) or previous
            stage: a link of its own keeps opposite transfers from waiting for each other. Empty on gloo, which has tags instead.
    """

    rank: int
    world_size: int
    coordinates: dict[str, int]
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    world: Group
    links: dict[tuple[int, bool], Group]

    def describe(self) -> str:
        """Return this rank's place for messages, such as `rank 5 (pp 1, dp 0, cp 0, tp 1)`."""
        return f"rank {self.rank} ({', '.join(f'{axis} {index}' for axis, index in self.coordinates.items())})"

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in rank order. Collective over the world; no pickle is involved."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=device)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths, group=self.world.process_group)
        sizes = lengths.tolist()
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=device)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else padded[:0]
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.world.process_group)
        return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]

    def close(self) -> None:
        """Close the groups' shared memory; the process groups belong to torch.distributed."""
        for group in (self.pp, self.dp, self.cp, self.tp, self.world):
            if group.shared is not None:
                group.shared.close()


def build_mesh(*, pp: int, dp: int, cp: int, tp: int, timeout_s: float, shared_memory: bool = True) -> Mesh:
    """Return the mesh over the default process group, whose size must be pp * dp * cp * tp.

    Args:
        timeout_s: bound of every wait in shared memory; the process groups keep the bound of the default group.
        shared_memory: whether CPU ranks of one host exchange tensors through shared memory.
    Collective: every rank of the world must enter.
    Raises:
        ValueError: the sizes do not multiply to the world size.
    """
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if pp * dp * cp * tp != world_size:
        product = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
        raise ValueError(f"{product} = {pp * dp * cp * tp} != world size {world_size}; start that many ranks or change `parallel`")
    backend = dist.get_backend()
    device_type = "cuda" if backend == "nccl" else "cpu"
    grid = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXES)
    coordinate = grid.get_coordinate()
    assert coordinate is not None, "every rank of the world lies on the mesh"
    coordinates = dict(zip(AXES, coordinate, strict=True))
    use_shared = shared_memory and backend == "gloo"

    def group(axis: str, process_group: dist.ProcessGroup, shared: bool) -> Group:
        ranks = tuple(dist.get_process_group_ranks(process_group))
        if len(ranks) == 1:
            return Group(axis, ranks, 0)
        names = [f"rank {other} ({axis} {index})" for index, other in enumerate(ranks)]
        memory = SharedMemory.connect(process_group, ranks.index(rank), names, timeout_s) if shared else None
        return Group(axis, ranks, ranks.index(rank), process_group, memory)

    groups = {axis: group(axis, grid.get_group(axis), use_shared and axis in ("dp", "tp")) for axis in AXES}
    world = dist.group.WORLD
    assert world is not None
    links = _build_links(grid.mesh.movedim(0, -1).reshape(-1, pp).tolist(), rank) if backend == "nccl" and pp > 1 else {}
    return Mesh(rank, world_size, coordinates, **groups, world=group("world", world, False), links=links)


def _build_links(pipelines: Sequence[Sequence[int]], rank: int) -> dict[tuple[int, bool], Group]:
    """Make the two-rank groups of every pipeline's ring, in the same order on all ranks; return those of `rank`'s pipeline."""
    links: dict[tuple[int, bool], Group] = {}
    for ranks in pipelines:
        for source, forward in itertools.product(range(len(ranks)), (True, False)):
            destination = (source + (1 if forward else -1)) % len(ranks)
            pair = (ranks[source], ranks[destination])
            process_group = dist.new_group(list(pair))
            if rank in pair:
                links[source, forward] = Group("pp", pair, pair.index(rank), process_group)
    return links
