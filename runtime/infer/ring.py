"""The ring of pipeline ranks during generation: each rank sends hidden states and drawn tokens to the next."""

import torch.distributed as dist
from torch import Tensor

from trimaran.models.parallel.group import Group, Wait, bounded_wait
from trimaran.runtime.mesh import Mesh


class Ring:
    """Transfers from each pipeline rank to the next, and from the last to the first.

    A link delivers in the order of sending. Sends do not block; a receive blocks up to the group's time-out. On NCCL
    the links take different groups (`Mesh.p2p_groups`).
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._size = mesh.pp, mesh.pp.size
        self._rank = mesh.pp.rank
        self._links = mesh.p2p_groups
        self._sent: dict[int, list[tuple[Wait, Tensor]]] = {}

    def send(self, x: Tensor, topic: int) -> None:
        """Start sending `x` to the next rank. It must not change before `settle` of the topic, which is any number."""
        group, target = self._link(self._rank), (self._rank + 1) % self._size
        x = x.contiguous()
        work = dist.isend(x, group=group.process_group, group_dst=target)
        wait = bounded_wait(work, group, f"a send of {list(x.shape)} to rank {group.ranks[target]}")
        self._sent.setdefault(topic, []).append((wait, x))

    def receive(self, x: Tensor) -> Tensor:
        """Return contiguous `x` filled with what the previous rank sends; RuntimeError where nothing arrives."""
        source = (self._rank - 1) % self._size
        group = self._link(source)
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

    def _link(self, source: int) -> Group:
        """The group of the link that starts at pipeline rank `source`."""
        return self._links.get((source, True), self._group)
