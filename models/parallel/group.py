"""Group: the ranks along one mesh axis, and the collectives over them; the backend decides how the bytes travel.

On gloo the ranks of one host exchange through shared memory (`shared_memory`); ranks of several hosts exchange shards
by isend and irecv, because gloo's reduce_scatter and all_gather cost five times as much. On NCCL, NCCL's collectives.

Every wait ends at the group's time-out. A wait that fails raises RuntimeError with the waiting rank, its peers and the
action; on NCCL, where waiting does not block the host, NCCL's watchdog reports instead. Shared memory overlaps
tensors of up to one slot (1 MiB) with computation; the start of a longer one returns only after the exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trimaran.models.parallel.shared_memory import SharedMemory

# torch 2.13 has renamed these two, and warns where the old name is used.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
Wait = Callable[[], None]
"""The result of starting a collective: call it to wait until the collective's result is valid."""


@dataclass(frozen=True, eq=False)
class Group:
    """The ranks along one mesh axis that have this rank's coordinates on the other axes.

    Args:
        axis: name of the mesh axis: "pp", "dp", "cp", "tp", "ep", "expert_dp", "embedding" or "world".
        ranks: global ranks, in the order of the axis.
        rank: this rank's index in `ranks`.
        process_group: None exactly when the group has one rank.
        shared: shared memory of the group's ranks, where all run on the CPUs of one host.
    """

    axis: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    shared: SharedMemory | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def on_gloo(self) -> bool:
        """Whether tensors travel through gloo or shared memory, without streams and fused collectives."""
        return self.process_group is not None and dist.get_backend(self.process_group) == "gloo"

    def wait_error(self, action: str, error: BaseException) -> RuntimeError:
        """Return the error of a failed wait: the waiting rank, its peers and the action."""
        others = ", ".join(str(rank) for rank in self.ranks if rank != self.ranks[self.rank])
        return RuntimeError(f"rank {self.ranks[self.rank]} waits for {self.axis} peers {others} in {action}: {error}")


def bounded_wait(work: dist.Work | None, group: Group, action: str) -> Wait:
    """Return the wait for `work`; a failure or time-out raises `Group.wait_error`."""
    assert work is not None

    def wait() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise group.wait_error(action, error) from error

    return wait


def single(axis: str, rank: int = 0) -> Group:
    """Return the group of one rank: every collective over it is the identity."""
    return Group(axis, (rank,), 0)


def start_all_reduce(x: Tensor, group: Group) -> Wait:
    """Start the sum of `x` [any shape, contiguous] over the group, in place. Collective."""
    if group.size == 1:
        return lambda: None
    if group.shared is not None:
        return group.shared.start_all_reduce(x)
    return bounded_wait(
        dist.all_reduce(x, group=group.process_group, async_op=True), group, f"all_reduce of {list(x.shape)}"
    )


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum `x` [any shape, contiguous] over the group, in place, and return it. Collective."""
    start_all_reduce(x, group)()
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Return every rank's `x` stacked on a new first dim [size, *x.shape]. Collective."""
    if group.size == 1:
        return x.unsqueeze(0)
    x = x.contiguous()
    out = x.new_empty((group.size, *x.shape))
    all_gather_into(out.view(group.size, -1), x.view(-1), group)
    return out


def all_gather_into(out: Tensor, x: Tensor, group: Group) -> None:
    """Fill `out` [size, n] with every rank's `x` [n]; both contiguous; `x` may be row `rank` of `out`. Collective."""
    start_all_gather_into(out, x, group)()


def start_all_gather_into(out: Tensor, x: Tensor, group: Group) -> Wait:
    """Start to fill `out` as `all_gather_into` does. Until the returned call neither may be touched. Collective."""
    if group.size == 1:
        if out.data_ptr() != x.data_ptr():
            out[0].copy_(x)
        return lambda: None
    if group.shared is not None:
        group.shared.all_gather(out, x)
        return lambda: None
    if group.on_gloo:
        if out[group.rank].data_ptr() != x.data_ptr():
            out[group.rank].copy_(x)
        return _start_exchange([x] * group.size, list(out), group)
    work = getattr(dist, ALL_GATHER)(out.view(-1), x, group=group.process_group, async_op=True)
    return bounded_wait(work, group, f"all_gather of {list(x.shape)}")


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Return this rank's slice x[rank] of the sum of x [size, ...] over the group. Collective."""
    if group.size == 1:
        return x[0]
    x = x.contiguous()
    out = torch.empty_like(x[0])
    start_reduce_scatter_into(out.view(-1), x.view(group.size, -1), group)()
    return out


def start_reduce_scatter_into(out: Tensor, x: Tensor, group: Group) -> Wait:
    """Start to fill `out` [n] with row `rank` of the sum of `x` [size, n] over the group; `out` may be that row of `x`.

    Both contiguous. Until the returned call, `x` must not change and `out` is not valid. Collective.
    """
    if group.size == 1:
        if out.data_ptr() != x.data_ptr():
            out.copy_(x[0])
        return lambda: None
    if group.shared is not None:
        group.shared.reduce_scatter(out, x)
        return lambda: None
    if not group.on_gloo:
        work = getattr(dist, REDUCE_SCATTER)(out, x.view(-1), group=group.process_group, async_op=True)
        return bounded_wait(work, group, f"reduce_scatter of {list(x.shape)}")
    parts = [x[group.rank] if peer == group.rank else torch.empty_like(out) for peer in range(group.size)]
    wait_exchange = _start_exchange(list(x), parts, group)

    def finish() -> None:
        wait_exchange()
        total = parts[0] + parts[1]  # in rank order, so that the sum does not depend on the order of arrival
        for part in parts[2:]:
            total.add_(part)
        out.copy_(total)

    return finish


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Return the rows that the ranks send to this one, in rank order [sum(received), ...]. Collective.

    Args:
        x: [sum(sent), ...], contiguous: the rows for each rank, in rank order.
        sent, received: rows to and from each rank; may be 0. Both ranks of a pair must agree.
    """
    if group.size == 1:
        return x
    out = x.new_empty(sum(received), *x.shape[1:])
    if not group.on_gloo:
        work = dist.all_to_all_single(out, x, list(received), list(sent), group=group.process_group, async_op=True)
        bounded_wait(work, group, f"all_to_all of {list(x.shape)}")()
        return out
    parts, theirs = list(x.split(list(sent))), list(out.split(list(received)))
    theirs[group.rank].copy_(parts[group.rank])
    _start_exchange(parts, theirs, group)()
    return out


def broadcast(x: Tensor, source: int, group: Group) -> Tensor:
    """Overwrite `x` [contiguous] with that of the rank of index `source`, and return it. Collective."""
    if group.size > 1:
        bounded_wait(
            dist.broadcast(x, group=group.process_group, group_src=source, async_op=True), group, "broadcast"
        )()
    return x


def send(x: Tensor, target: int, group: Group) -> None:
    """Send `x` to the rank of index `target`, which must call `receive`; return once it is sent."""
    bounded_wait(
        dist.isend(x.contiguous(), group=group.process_group, group_dst=target),
        group,
        f"a send to rank {group.ranks[target]}",
    )()


def receive(x: Tensor, source: int, group: Group) -> Tensor:
    """Fill `x` [contiguous] with the tensor that the rank of index `source` sends, and return it."""
    bounded_wait(
        dist.irecv(x, group=group.process_group, group_src=source), group, f"a receive from rank {group.ranks[source]}"
    )()
    return x


def _start_exchange(sends: list[Tensor], receives: list[Tensor], group: Group) -> Wait:
    """Start to send `sends[peer]` to and receive `receives[peer]` from every peer at once, so that none deadlocks."""
    peers = [peer for peer in range(group.size) if peer != group.rank]
    works = [
        dist.irecv(receives[peer], group_src=peer, group=group.process_group)
        for peer in peers
        if receives[peer].numel()
    ]
    works += [
        dist.isend(sends[peer], group_dst=peer, group=group.process_group) for peer in peers if sends[peer].numel()
    ]
    waits = [bounded_wait(work, group, f"an exchange of {list(receives[0].shape)}") for work in works]

    def wait() -> None:
        for each in waits:
            each()

    return wait
