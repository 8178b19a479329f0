"""Transfers of activations and gradients between neighbouring pipeline ranks: non-blocking, with bounded waits."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import Group
from trimaran.models.parallel.parameter import LayerContext
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
    """Sends and receives [batch, local seq, hidden] tensors of one dtype along the pipeline.

    Their shape is that of the microbatch, which every rank of the pipeline has; microbatches may differ in length.

    On gloo a tag distinguishes the two directions; on NCCL a group does (`Mesh.p2p_groups`).

    Args:
        placement: stage -> pipeline rank.
        hidden: the width of the model.
        parts: ranks that share a sequence (sequence parallelism), else 1.
        has_query_stream: whether the predicted positions are in the tensor too, after the tokens (XLNet).
    """

    mesh: Mesh
    placement: Placement
    hidden: int
    parts: int
    dtype: torch.dtype
    device: torch.device
    has_query_stream: bool = False
    _sends: dict[Action, tuple[dist.Work, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: Mesh, placement: Placement, model: TransformerConfig, context: LayerContext) -> "P2PTransport":
        """Return that of a model whose layers are built with `context`."""
        parts = context.tp.size if context.sequence_parallel else 1
        has_queries = model.has_query_stream
        return cls(mesh, placement, model.hidden_size, parts, context.dtype, context.device, has_queries)

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

    def _shape(self, batch: Microbatch) -> tuple[int, int, int]:
        rows, seq = batch.tokens.shape
        if self.has_query_stream:
            seq += batch.labels.shape[1]
        return rows, seq // self.parts, self.hidden

    def post_receive(self, action: Action, batch: Microbatch) -> P2PHandle:
        """Post the receive of `action`'s tensor, of this microbatch."""
        peer = peer_rank(action, self.placement)
        group, tag = self._channel(action, peer, self.mesh.pp.rank)
        tensor = torch.empty(self._shape(batch), dtype=self.dtype, device=self.device)
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
