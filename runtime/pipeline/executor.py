"""The executor: runs one rank's list of actions, the same list that was validated, drawn and simulated.

It knows no schedule by name.
"""

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.transformer import Stage
from trimaran.runtime.pipeline.backward import backward
from trimaran.runtime.pipeline.schedule import Action, ActionKind
from trimaran.runtime.pipeline.transport import P2PHandle, P2PTransport

Key = tuple[int, int]
"""(stage, microbatch)."""


class Executor:
    """Runs a schedule's actions over this rank's stages.

    Args:
        stages: stage index -> stage, of this rank.
        actions: this rank's list, with communication.
        loss_weight: weight of each token's loss in the gradient, such as 1 / tokens of the global batch.
        on_last_backward: called with the stage's index before its last backward of the step.

    Attributes:
        loss: after `run`, the sum of the losses of this rank's microbatches [scalar], zero on ranks without the last
            stage.
        spans: after `run`, (action, start, stop) of every compute action, in seconds since `run` began, without the
            wait for its input.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        actions: Sequence[Action],
        transport: P2PTransport,
        *,
        loss_weight: float,
        on_last_backward: Callable[[int], None] = lambda stage: None,
    ) -> None:
        self.stages, self.actions, self.transport = stages, actions, transport
        self._loss_weight, self._on_last_backward = loss_weight, on_last_backward
        self._last_backward = {action.stage: action for action in actions if action.kind is ActionKind.B}
        self._batches: Sequence[Microbatch] = ()
        self._arriving: dict[tuple[ActionKind, int, int], P2PHandle] = {}
        self._inputs: dict[Key, Tensor | None] = {}
        self._outputs: dict[Key, Tensor] = {}
        self._output_grads: dict[Key, Tensor] = {}
        self._compute_start = 0.0
        self.loss = torch.zeros(())
        self.spans: list[tuple[Action, float, float]] = []

    def run(self, batches: Sequence[Microbatch]) -> None:
        """Run the whole list, with one batch for each microbatch. Collective over the pipeline and the tp group."""
        self._batches, self.spans = [batch.to(self.transport.device) for batch in batches], []
        self.loss = torch.zeros((), dtype=torch.float64, device=self.transport.device)
        begin = time.perf_counter()
        for action in self.actions:
            self._DISPATCH[action.kind](self, action, (action.stage, action.microbatch))
            if action.kind.is_compute:
                self.spans.append((action, self._compute_start - begin, time.perf_counter() - begin))
        self.transport.finish()

    def _forward(self, action: Action, key: Key) -> None:
        stage = self.stages[action.stage]
        handle = self._arriving.pop((ActionKind.RECV_F, *key), None)
        hidden = self._inputs.pop(key, None) if handle is None else self.transport.wait(handle)
        self._compute_start = time.perf_counter()
        if hidden is not None and torch.is_grad_enabled():
            hidden.requires_grad_()
        output = stage(hidden, self._batches[action.microbatch], self._loss_weight)
        if stage.is_last:
            self.loss += output.detach()
        if torch.is_grad_enabled():
            self._inputs[key] = hidden
        next_is_here = action.stage + 1 in self.stages
        if torch.is_grad_enabled() or not (stage.is_last or next_is_here):  # an output without a consumer is not kept
            self._outputs[key] = output
        if next_is_here:  # pass the tensor without a transfer
            self._inputs[action.stage + 1, action.microbatch] = output.detach()

    def _backward(self, action: Action, key: Key) -> None:
        if self._last_backward[action.stage] == action:
            self._on_last_backward(action.stage)
        hidden, output = self._inputs.pop(key), self._outputs.pop(key)
        handle = self._arriving.pop((ActionKind.RECV_B, *key), None)
        if handle is not None:
            grad = self.transport.wait(handle)
        elif self.stages[action.stage].is_last:
            grad = torch.full_like(output, self._loss_weight)
        else:
            grad = self._output_grads.pop(key)
        self._compute_start = time.perf_counter()
        backward(output, grad)
        if hidden is not None:
            assert hidden.grad is not None, "every stage's output depends on its input"
            self._output_grads[action.stage - 1, action.microbatch] = hidden.grad

    def _send_forward(self, action: Action, key: Key) -> None:
        output = self._outputs[key] if torch.is_grad_enabled() else self._outputs.pop(key)
        self.transport.send(action, output.detach())

    def _send_backward(self, action: Action, key: Key) -> None:
        self.transport.send(action, self._output_grads.pop((action.stage - 1, action.microbatch)))

    def _receive(self, action: Action, key: Key) -> None:
        self._arriving[action.kind, *key] = self.transport.post_receive(action)

    _DISPATCH: ClassVar[dict[ActionKind, Callable[["Executor", Action, Key], None]]] = {
        ActionKind.F: _forward,
        ActionKind.B: _backward,
        ActionKind.SEND_F: _send_forward,
        ActionKind.SEND_B: _send_backward,
        ActionKind.RECV_F: _receive,
        ActionKind.RECV_B: _receive,
    }
