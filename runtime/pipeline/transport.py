"""Transfers of activations and their gradients between neighbouring pipeline ranks: non-blocking starts and bounded waits."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from trimaran.models.parallel.group import Group
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.passes import peer_rank
from trimaran.runtime.pipeline.schedule import Action, ActionKind

_FORWARD = (ActionKind.SEND_F, ActionKind.RECV_F)


@dataclass(eq=False)
class Arrival:
    """A tensor on its way to this rank."""

    action: Action
    tensor: Tensor
    work: dist.Work


@dataclass(eq=False)
class Transport:
    """Sends and receives [batch, local seq, hidden] tensors of one shape and dtype along the pipeline.

    On gloo the two directions are told apart by a tag; on NCCL each directed link has a group of its own (`Mesh.links`).
    """

    mesh: Mesh
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    _sends: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def _channel(self, action: Action, source: int, peer: int) -> tuple[Group, int, int]:
        """The group that carries the transfer, the peer's index in it, and the tag."""
        forward = action.kind in _FORWARD
        link = self.mesh.links.get((source, forward))
        return (self.mesh.pp, peer, int(forward)) if link is None else (link, 1 - link.rank, 0)

    def send(self, action: Action, x: Tensor) -> None:
        """Start sending `x`; it is kept alive until it has left."""
        peer = peer_rank(action, self.mesh.pp.size)
        group, index, tag = self._channel(action, self.mesh.pp.rank, peer)
        self._sends = [(work, tensor) for work, tensor in self._sends if not work.is_completed()]
        x = x.contiguous()
        work = dist.isend(x, group_dst=index, group=group.process_group, tag=tag)
        assert work is not None
        self._sends.append((work, x))

    def post_receive(self, action: Action) -> Arrival:
        """Post the receive of `action`'s tensor."""
        peer = peer_rank(action, self.mesh.pp.size)
        group, index, tag = self._channel(action, peer, peer)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        work = dist.irecv(tensor, group_src=index, group=group.process_group, tag=tag)
        assert work is not None
        return Arrival(action, tensor, work)

    def wait(self, arrival: Arrival) -> Tensor:
        """Return the tensor once it is here.

        Raises:
            RuntimeError: it did not come within the group's time-out, or its sender is gone; says who waits for whom, in which action.
        """
        try:
            arrival.work.wait()
        except RuntimeError as error:
            peer = self.mesh.pp.ranks[peer_rank(arrival.action, self.mesh.pp.size)]
            raise RuntimeError(f"{self.mesh.describe()} waits for rank {peer} in action {arrival.action}: {error}") from error
        return arrival.tensor

    def finish(self) -> None:
        """Wait until every started send has left."""
        for work, _ in self._sends:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"{self.mesh.describe()} could not finish its pipeline sends: {error}") from error
        self._sends = []
