"""The executor: runs one rank's list of actions, the same list that was validated, drawn and simulated.

It knows no schedule by name.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from trimaran.models.batch import Microbatch
from trimaran.models.transformer import Stage
from trimaran.runtime.pipeline.action import Action, ActionKind, Entry, actions_of
from trimaran.runtime.pipeline.flight import Flight
from trimaran.runtime.pipeline.transport import P2PHandle, P2PTransport


class Executor:
    """Runs a schedule's actions over this rank's stages.

    Args:
        stages: stage index -> stage, of this rank.
        actions: this rank's list, with communication.
        loss_weight: weight of each token's loss in the gradient, such as 1 / tokens of the global batch, where every
            row has as many labels; each row's load-balancing loss has that of its labels.

    Attributes:
        on_action: called with every action before it runs, and with None when all have run.
        loss: after `run`, the sum of the losses of this rank's microbatches [scalar], zero on ranks without the last
            stage.
        spans: after `run`, (action, start, stop) of every compute action, in seconds since `run` began, without the
            wait for its input.
    """

    def __init__(
        self, stages: dict[int, Stage], actions: Sequence[Entry], transport: P2PTransport, *, loss_weight: float
    ) -> None:
        self.stages, self.actions, self.transport = stages, actions, transport
        self._loss_weight = self._row_weight = loss_weight
        self._batches: Sequence[Microbatch] = ()
        self._arriving: dict[Action, P2PHandle] = {}
        self._flights: defaultdict[tuple[int, int], Flight] = defaultdict(Flight)  # (stage, microbatch) -> its flight
        self._compute_start = 0.0
        self.on_action: Callable[[Action | None], None] = lambda action: None
        self.loss = torch.zeros(())
        self.spans: list[tuple[Action, float, float]] = []

    def run(self, batches: Sequence[Microbatch], loss_weight: float | None = None) -> None:
        """Run the whole list, with one batch for each microbatch. Collective over the pipeline and the tp group.

        Args:
            loss_weight: of each loss that the last stage sums, in this run; None: as constructed.
        """
        self._loss_weight = self._row_weight if loss_weight is None else loss_weight
        self._batches, self.spans = [batch.to(self.transport.device) for batch in batches], []
        self.loss = torch.zeros((), dtype=torch.float64, device=self.transport.device)
        begin = time.perf_counter()
        for action in actions_of(self.actions):
            self.on_action(action)
            flight = self._flights[action.stage, action.microbatch]
            self._DISPATCH[action.kind](self, action, flight)
            if flight.is_over:
                del self._flights[action.stage, action.microbatch]
            if action.kind.is_compute:
                self.spans.append((action, self._compute_start - begin, time.perf_counter() - begin))
        self.transport.finish()
        self.on_action(None)

    def _forward(self, action: Action, flight: Flight) -> None:
        stage = self.stages[action.stage]
        self._take(ActionKind.RECV_F, action, "hidden")
        hidden = flight.hidden
        self._compute_start = time.perf_counter()
        if hidden is not None and torch.is_grad_enabled():
            hidden.requires_grad_()
        batch = self._batches[action.microbatch]
        output = stage(hidden, batch, self._loss_weight, self._row_weight * batch.labels.shape[1])
        if stage.is_last:
            self.loss += output.detach()
        after = None if stage.is_last else self._neighbour(action, 1)
        if after is not None:  # pass the tensor without a transfer
            after.hidden = output.detach()
        if torch.is_grad_enabled():
            flight.output = output
        else:  # a tensor without a consumer is not kept
            flight.hidden, flight.output = None, None if stage.is_last or after is not None else output

    def _backward(self, action: Action, flight: Flight) -> None:
        self._take(ActionKind.RECV_B, action, "grad")
        hidden, output, grad = flight.hidden, flight.output, flight.grad
        assert output is not None, "the forward is before the backward"
        flight.hidden = flight.output = flight.grad = None
        if grad is None:
            assert self.stages[action.stage].is_last
            grad = torch.full_like(output, self._loss_weight)
        self._compute_start = time.perf_counter()
        self.stages[action.stage].backward(output, grad)
        if hidden is not None:
            assert hidden.grad is not None, "every stage's output depends on its input"
            before = self._neighbour(action, -1)
            (flight if before is None else before).grad = hidden.grad

    def _input_gradient(self, action: Action, flight: Flight) -> None:
        with self.stages[action.stage].context.queue.into(flight.later):
            self._backward(action, flight)

    def _weight_gradients(self, action: Action, flight: Flight) -> None:
        self._compute_start = time.perf_counter()
        with torch.no_grad():
            for compute in flight.later:
                compute()
        flight.later = []

    def _take(self, kind: ActionKind, action: Action, name: str) -> None:
        """Wait for the transfer of `kind` that brings the action's input, if there is one."""
        handle = self._arriving.pop(Action(kind, action.stage, action.microbatch), None)
        if handle is not None:
            setattr(self._flights[action.stage, action.microbatch], name, self.transport.wait(handle))

    def _neighbour(self, action: Action, step: int) -> Flight | None:
        """The same microbatch in the stage at `step`, if this rank has that stage."""
        stage = action.stage + step
        return self._flights[stage, action.microbatch] if stage in self.stages else None

    def _send_forward(self, action: Action, flight: Flight) -> None:
        assert flight.output is not None
        self.transport.send(action, flight.output.detach())
        if not torch.is_grad_enabled():
            flight.output = None

    def _send_backward(self, action: Action, flight: Flight) -> None:
        assert flight.grad is not None
        self.transport.send(action, flight.grad)
        flight.grad = None

    def _receive(self, action: Action, flight: Flight) -> None:
        self._arriving[action] = self.transport.post_receive(action, self._batches[action.microbatch])

    _DISPATCH: ClassVar[dict[ActionKind, Callable[["Executor", Action, Flight], None]]] = {
        ActionKind.F: _forward,
        ActionKind.B: _backward,
        ActionKind.I: _input_gradient,
        ActionKind.W: _weight_gradients,
        ActionKind.SEND_F: _send_forward,
        ActionKind.SEND_B: _send_backward,
        ActionKind.RECV_F: _receive,
        ActionKind.RECV_B: _receive,
    }
