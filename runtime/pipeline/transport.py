"""Transfers of activations and gradients between neighbouring pipeline ranks: non-blocking, with bounded waits."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from trimaran.models.parallel.group import Group
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.action import Action, ActionKind
from trimaran.runtime.pipeline.passes import peer_rank
from trimaran.runtime.pipeline.schedule import Placement

_FORWARD = (ActionKind.SEND_F, ActionKind.RECV_F)


@dataclass(eq=False)
class P2PHandle:
    """A tensor on its way to this rank."""

    action: Action
    tensor: Tensor
    work: dist.Work


@dataclass(eq=False)
class P2PTransport:
    """Sends and receives [batch, local seq, hidden] tensors of one shape and dtype along the pipeline.

    On gloo a tag distinguishes the two directions; on NCCL a group does (`Mesh.p2p_groups`).

    Args:
        placement: stage -> pipeline rank.
    """

    mesh: Mesh
    placement: Placement
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    _sends: dict[Action, tuple[dist.Work, Tensor]] = field(default_factory=dict)

    def _channel(self, action: Action, source: int, target: int) -> tuple[Group, int]:
        """The group of the transfer from pipeline rank `source` to `target`, and the tag."""
        forward = action.kind in _FORWARD
        link = self.mesh.p2p_groups.get((source, target, forward))
        return (self.mesh.pp, int(forward)) if link is None else (link, 0)

    def send(self, action: Action, x: Tensor) -> None:
        """Start sending `x`, which is kept alive until the send is complete.

        gloo reports that only to a wait, so an activation is released when its gradient arrives, and a gradient at the
        end of the step.
        """
        peer = peer_rank(action, self.placement)
        group, tag = self._channel(action, self.mesh.pp.rank, peer)
        self._sends = {sent: pair for sent, pair in self._sends.items() if not pair[0].is_completed()}
        x = x.contiguous()
        work = dist.isend(x, group_dst=peer, group=group.process_group, tag=tag)
        assert work is not None
        self._sends[action] = (work, x)

    def post_receive(self, action: Action) -> P2PHandle:
        """Post the receive of `action`'s tensor."""
        peer = peer_rank(action, self.placement)
        group, tag = self._channel(action, peer, self.mesh.pp.rank)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        work = dist.irecv(tensor, group_src=peer, group=group.process_group, tag=tag)
        assert work is not None
        return P2PHandle(action, tensor, work)

    def wait(self, handle: P2PHandle) -> Tensor:
        """Return the tensor when it has arrived.

        Raises:
            RuntimeError: it did not arrive within the group's time-out, or its sender is gone; says who waits for whom,
                in which action.
        """
        action = handle.action
        self._wait(action, handle.work)
        if action.kind is ActionKind.RECV_B:  # the peer has received the activation of this gradient
            self._finish_send(Action(ActionKind.SEND_F, action.stage, action.microbatch))
        return handle.tensor

    def finish(self) -> None:
        """Wait until every started send is complete; raises as `wait` does."""
        for action in list(self._sends):
            self._finish_send(action)

    def _finish_send(self, action: Action) -> None:
        if action in self._sends:
            work, _ = self._sends.pop(action)
            self._wait(action, work)

    def _wait(self, action: Action, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            peer = self.mesh.pp.ranks[peer_rank(action, self.placement)]
            raise RuntimeError(f"{self.mesh.describe()} waits for rank {peer} in action {action}: {error}") from error
