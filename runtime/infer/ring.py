"""Transfers between pipeline ranks during generation: hidden states between stages, drawn tokens round the ring."""

import torch.distributed as dist
from torch import Tensor

from trimaran.models.parallel.group import Group, Wait, bounded_wait
from trimaran.runtime.mesh import Mesh


class Ring:
    """Transfers between pipeline ranks, each of which also knows the next and the previous one of the ring.

    A link delivers in the order of sending. Sends do not block; a receive blocks up to the group's time-out. On NCCL
    the links take different groups (`Mesh.p2p_groups`).
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._rank = mesh.pp, mesh.pp.rank
        self.next, self.previous = (self._rank + 1) % mesh.pp.size, (self._rank - 1) % mesh.pp.size
        self._links = mesh.p2p_groups
        self._sent: dict[int, list[tuple[Wait, Tensor]]] = {}

    def send(self, x: Tensor, target: int, topic: int) -> None:
        """Start sending `x` to a pipeline rank. It must not change before `settle` of the topic, any number."""
        group = self._link(self._rank, target)
        x = x.contiguous()
        work = dist.isend(x, group=group.process_group, group_dst=target)
        wait = bounded_wait(work, group, f"a send of {list(x.shape)} to rank {group.ranks[target]}")
        self._sent.setdefault(topic, []).append((wait, x))

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Return contiguous `x` filled with what a pipeline rank sends; RuntimeError where nothing arrives."""
        group = self._link(source, self._rank)
        work = dist.irecv(x, group=group.process_group, group_src=source)
        bounded_wait(work, group, f"a receive of {list(x.shape)} from rank {group.ranks[source]}")()
        return x

    def settle(self, topic: int) -> None:
        """Wait for the topic's sends and release their tensors; RuntimeError if a peer does not receive."""
        for wait, _ in self._sent.pop(topic, ()):
            wait()

    def finish(self) -> None:
        """Settle every topic."""
        for topic in list(self._sent):
            self.settle(topic)

    def _link(self, source: int, target: int) -> Group:
        """The group of the link from one pipeline rank to another."""
        return self._links.get((source, target, True), self._group)
