"""Mesh: the grid of ranks and its process groups, built once. No other code computes a rank from a rank."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from trimaran.models.parallel.group import Group, all_gather, all_reduce, receive, send
from trimaran.models.parallel.shared_memory import SharedMemory
from trimaran.runtime.grid import AXES, coordinates, describe_coordinates

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
Link = tuple[int, int, bool]
"""(source pp index, target pp index, forward): a way that activations (forward) or gradients take."""
_SHARING_AXES = ("dp", "tp", "expert_dp", "shard", "replica", "expert_shard", "expert_replica", "embedding")
"""Axes whose tensors may go through shared memory."""


@dataclass(frozen=True, eq=False)
class Sharding:
    """The data-parallel ranks of one replica of the model's shards, and the replicas beyond them.

    Args:
        shard: consecutive dp ranks, each of which holds one share of what ZeRO shards.
        replica: the dp ranks that hold the same share as this one.
    """

    shard: Group
    replica: Group


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's coordinates, its group on each axis, and `world`, the group of all ranks.

    Args:
        coordinates: axis name -> this rank's index on it.
        ep: consecutive dp ranks that share the experts between them.
        expert_dp: the dp / ep ranks that hold the same experts as this one; `dp` itself where ep is 1.
        sharding, expert_sharding: `dp` and `expert_dp`, parted into the ranks that share what ZeRO shards.
        embedding: the pipeline ranks of the first and of the last stage, which hold the two ends of a tied embedding;
            on the other ranks, and where nothing is tied or one rank has both, this rank alone.
        p2p_groups: on NCCL, (source pp index, target pp index, forward) -> the group over this pipeline that carries
            the transfers from source to target, of activations (forward) or of gradients. Empty on gloo, which has tags
            instead.
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
    sharding: Sharding
    expert_sharding: Sharding
    embedding: Group
    world: Group
    p2p_groups: dict[Link, Group]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of collectives, in the order in which every rank makes and warms them."""
        parts = [group for each in (self.sharding, self.expert_sharding) for group in (each.shard, each.replica)]
        groups = (self.pp, self.dp, self.cp, self.tp, self.expert_dp, self.ep, *parts, self.embedding, self.world)
        return tuple({id(group): group for group in groups}.values())

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
        for group in self.groups:
            if group.shared is not None:
                group.shared.close()


def build_mesh(
    *,
    pp: int,
    dp: int,
    cp: int,
    tp: int,
    ep: int = 1,
    shard_size: int | None = None,
    timeout_s: float,
    device: torch.device = _CPU,
    shared_memory: bool = True,
    tied_embedding: bool = True,
    has_tags: bool | None = None,
    placement: Sequence[int] = (),
) -> Mesh:
    """Return the mesh over the default process group, whose size must be pp * dp * cp * tp.

    Collective: every rank of the world must enter. All groups are made here, and on NCCL used once: a group's first
    use connects its ranks and holds the host until all of them are there, which the early receives of a pipeline
    schedule would turn into a deadlock.

    Args:
        ep: how many consecutive dp ranks share the experts.
        shard_size: how many consecutive dp ranks share what ZeRO shards; by default all.
        timeout_s: bound of every wait, in the process groups and in shared memory.
        device: of this rank's tensors.
        shared_memory: whether CPU ranks of one host exchange tensors through shared memory.
        tied_embedding: whether to make the group of the embedding's two ends.
        has_tags: whether a tag tells the transfers of one group apart, so that no `p2p_groups` are needed; by default
            whether the backend is gloo.
        placement: stage -> pp index, of the pipeline's schedule; by default the stages go round the pipeline ranks.

    Raises:
        ValueError: the sizes do not multiply to the world size, ep or shard_size does not divide dp, or neither of
            these two divides the other.
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
    shard_size = dp if shard_size is None else shard_size
    if dp % shard_size or max(shard_size, ep) % min(shard_size, ep):
        raise ValueError(
            f"shard_size ({shard_size}) must divide dp ({dp}), and divide ep ({ep}) or be divisible by it; "
            "change zero.shard_size"
        )
    on_gloo = dist.get_backend() == "gloo"
    has_tags = on_gloo if has_tags is None else has_tags
    grid = torch.arange(world_size).view(pp, dp, cp, tp)
    maker = _GroupMaker(rank, timeout_s, device, shared_memory and on_gloo)
    groups = {axis: maker.along_dim(axis, grid, dim) for dim, axis in enumerate(AXES)}
    groups |= {"ep": Group("ep", (rank,), 0), "expert_dp": groups["dp"]}
    if ep > 1:
        experts = grid.view(pp, dp // ep, ep, cp, tp)
        groups |= {axis: maker.along_dim(axis, experts, dim) for dim, axis in ((1, "expert_dp"), (2, "ep"))}
    sharding = maker.sharding(grid, groups["dp"], shard_size, 1)
    expert_sharding = sharding if ep == 1 else maker.sharding(grid, groups["expert_dp"], max(1, shard_size // ep), ep)
    pipelines = grid.flatten(1).t().tolist()
    ends = (placement[0], placement[-1]) if placement else (0, pp - 1)
    alone = Group("embedding", (rank,), 0)
    groups["embedding"] = maker.ends(pipelines, groups["pp"], ends) if tied_embedding else alone
    groups["world"] = _world_group(list(groups.values()), rank, world_size)
    p2p_groups = {} if has_tags else maker.p2p_groups(pipelines, groups["pp"], links_of(placement, pp))
    mesh = Mesh(
        rank,
        world_size,
        coordinates(rank, sizes),
        **groups,
        sharding=sharding,
        expert_sharding=expert_sharding,
        p2p_groups=p2p_groups,
    )
    if not has_tags:
        _warm_up(mesh, device)
    return mesh


def model_group(mesh: Mesh, timeout_s: float, device: torch.device) -> Group:
    """Return the group of the ranks that hold one copy of the model: those of this rank's dp index. Collective.

    It has a process group even where one rank is alone. Only DeepSpeed asks for it.
    """
    grid = torch.arange(mesh.world_size).view(mesh.pp.size, mesh.dp.size, mesh.cp.size, mesh.tp.size)
    maker = _GroupMaker(mesh.rank, timeout_s, device, shared_memory=False)
    return maker.make("model", grid.transpose(0, 1).flatten(1).tolist())


def lone_mesh() -> Mesh:
    """Return the mesh of one rank, without process groups."""
    groups = {axis: Group(axis, (0,), 0) for axis in (*AXES, "ep", "expert_dp", "embedding", "world")}
    alone = Sharding(groups["dp"], Group("replica", (0,), 0))
    return Mesh(0, 1, dict.fromkeys(AXES, 0), **groups, sharding=alone, expert_sharding=alone, p2p_groups={})


def links_of(placement: Sequence[int], pp: int) -> list[Link]:
    """Return the links that carry transfers: those of the ring of `pp` ranks, then what else the placement needs.

    Generation takes the ring forwards, and so does a pipeline whose stages go round its ranks.
    """
    ring = [(rank, (rank + 1) % pp) for rank in range(pp)]
    pairs = [*ring, *((a, b) for a, b in pairwise(placement) if a != b)]
    forward = [(source, target, True) for source, target in pairs]
    return list(dict.fromkeys([*forward, *((target, source, False) for source, target in pairs)]))


def _world_group(groups: Sequence[Group], rank: int, world_size: int) -> Group:
    """Return the group of all ranks: that of an axis where it has them all, else torch's default group."""
    whole = next((group for group in groups if group.size == world_size), None)
    if whole is not None:
        return replace(whole, axis="world", shared=None)
    return Group("world", tuple(range(world_size)), rank, dist.group.WORLD)


def _warm_up(mesh: Mesh, device: torch.device) -> None:
    """Use every group once, in one order on all ranks: that connects what would otherwise connect at its first use."""
    x = torch.zeros(1, device=device)
    for group in mesh.groups:
        all_reduce(x, group)
    for (source, target, _), link in mesh.p2p_groups.items():
        if link.rank == source:
            send(x, target, link)
        elif link.rank == target:
            receive(x, source, link)
    x.tolist()  # waits for the device


@dataclass(frozen=True)
class _GroupMaker:
    """Makes this rank's process groups, without the ranks outside them.

    torch names such a group by its ranks and by how many groups this rank has made before. The members must agree on
    the name, so all ranks make the same number: each call divides the world into groups, and every rank makes its own.
    (DeviceMesh is not used because its groups have torch's own time-out, half an hour on gloo.)
    """

    rank: int
    timeout_s: float
    device: torch.device
    shared_memory: bool

    def along_dim(self, axis: str, grid: torch.Tensor, dim: int) -> Group:
        """Return the group of this rank's line of the grid along `dim`, which is mesh axis `axis`."""
        if grid.shape[dim] == 1:
            return Group(axis, (self.rank,), 0)
        return self.make(axis, grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist())

    def sharding(self, grid: torch.Tensor, dp: Group, shard_size: int, step: int) -> Sharding:
        """Part this rank's group `dp`, whose ranks are `step` dp indices apart, by `shard_size` consecutive ones."""
        name = "" if step == 1 else "expert_"
        if shard_size == dp.size:
            return Sharding(dp, Group(f"{name}replica", (self.rank,), 0))
        if shard_size == 1:
            return Sharding(Group(f"{name}shard", (self.rank,), 0), dp)
        parted = grid.unflatten(1, (-1, shard_size, step))
        return Sharding(self.along_dim(f"{name}shard", parted, 2), replica=self.along_dim(f"{name}replica", parted, 1))

    def ends(self, pipelines: Sequence[Sequence[int]], pp: Group, ends: tuple[int, int]) -> Group:
        """Return the group of the two pp indices `ends` of this rank's pipeline; elsewhere, this rank alone."""
        if ends[0] == ends[1]:
            return Group("embedding", (self.rank,), 0)
        if pp.size == 2:
            return self._with_shared_memory(replace(pp, axis="embedding"))
        pairs = [[ranks[index] for index in sorted(ends)] for ranks in pipelines]
        # The others are made for the number of groups alone, and never used.
        others = [[rank for index, rank in enumerate(ranks) if index not in ends] for ranks in pipelines]
        is_end = pp.rank in ends
        group = self.make("embedding", [*pairs, *others], is_used=is_end)
        return group if is_end else Group("embedding", (self.rank,), 0)

    def p2p_groups(self, pipelines: Sequence[Sequence[int]], pp: Group, links: Sequence[Link]) -> dict[Link, Group]:
        """Return the groups of transfers of this rank's pipeline; see `Mesh.p2p_groups`.

        Transfers of one group wait for each other. So a rank sends or receives, with one neighbour, in each group:
        every link takes the first group that neither of its ends uses.
        """
        if pp.size == 1:
            return {}
        users: list[set[int]] = []
        numbers = []
        for source, target, _ in links:
            number = next((n for n, ranks in enumerate(users) if not ranks & {source, target}), len(users))
            if number == len(users):
                users.append(set())
            users[number] |= {source, target}
            numbers.append(number)
        made = [self.make("pp", pipelines) for _ in users]
        return {link: made[number] for link, number in zip(links, numbers, strict=True)}

    def make(self, axis: str, division: Sequence[Sequence[int]], *, is_used: bool = True) -> Group:
        """Make the group of this rank among those that divide the world. Collective over that group.

        Args:
            is_used: whether NCCL connects its ranks at once, and CPU ranks may share memory.
        """
        ranks = tuple(next(ranks for ranks in division if self.rank in ranks))
        process_group = dist.new_group(
            list(ranks),
            timeout=timedelta(seconds=self.timeout_s),
            use_local_synchronization=True,
            group_desc=axis,
            device_id=self.device if is_used and self.device.type == "cuda" else None,
        )
        group = Group(axis, ranks, ranks.index(self.rank), process_group)
        return self._with_shared_memory(group) if is_used else group

    def _with_shared_memory(self, group: Group) -> Group:
        """Return the group with shared memory, where its tensors may go through it and its ranks share a host."""
        if not self.shared_memory or group.axis not in _SHARING_AXES or group.process_group is None:
            return group
        names = [f"rank {other} ({group.axis} {position})" for position, other in enumerate(group.ranks)]
        memory = SharedMemory.connect(group.process_group, group.rank, names, self.timeout_s)
        if memory is None and group.rank == 0:
            logger.warning(
                "ranks %s share no /dev/shm with room for %d MiB: their %s tensors go through gloo",
                group.ranks,
                2 * group.size,
                group.axis,
            )
        return replace(group, shared=memory)
