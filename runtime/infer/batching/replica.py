"""Continuous batching on the ranks of a dp replica: requests join and leave between two tokens, at any tp and pp.

The leader (pp rank 0, tp rank 0) alone hears and tells what is outside. Ahead of each turn of a group it sends its
orders to the other ranks of the replica; everything else, who gets which row and what is read next, each rank decides
by itself, alike, from the orders and the drawn tokens (`rows.RowGroup`). With several pipeline ranks there are as many
groups of rows, so that the ranks work on different groups at the same time, and the drawn tokens travel around the ring
of ranks ahead of the group's next orders, as in `generate`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import torch
from torch import Tensor

from trimaran.models.cache.rows import RowCache
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import all_reduce
from trimaran.models.transformer import Stage, in_eval_mode
from trimaran.runtime.infer.batching.messages import Event, Failed, Finished, PromptScores, Request
from trimaran.runtime.infer.batching.orders import Cancel, Desk, End, Order, Ready, decode_order, encode_order
from trimaran.runtime.infer.batching.passes import Passes, decoded
from trimaran.runtime.infer.batching.rows import Pass, Pieces, RowGroup
from trimaran.runtime.infer.generate import check_prompts, longest_shared
from trimaran.runtime.infer.ring import Ring
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec

_WORD: Final = 8  # bytes of an int64
_PREFERRED: Final = 32  # tokens that a group has of a prompt, for which another group's free rows are passed over
_HEARTBEATS: Final = 4  # in the time after which a rank that hears nothing gives up
_ALONE: Final = {"cpu": 2048, "cuda": 8192}
_AMONG: Final = {"cpu": 128, "cuda": 1024}  # read as fast as more, and over in the time of a few tokens
_WARM_UP: Final = -1
_WARM_TOKENS: Final = 32


@dataclass(frozen=True)
class Limits:
    """How much a replica does at once.

    Args:
        slots: texts that are continued at the same time.
        context: most tokens of a prompt and its continuation; the model's, or fewer.
        pieces: how much of prompts is read at once; by default what suits the device.
    """

    slots: int
    context: int
    pieces: Pieces | None = None


# Inference mode has no version counters and no view tracking.
@torch.inference_mode()
def serve(stages: dict[int, Stage], mesh: Mesh, spec: RunSpec, limits: Limits, desk: Desk) -> None:
    """Continue texts until the leader's desk says End. Collective over the pipeline and the tp group.

    Args:
        stages: of this rank: one, without sequence parallelism.
        desk: asked on the leader alone.

    Raises:
        RuntimeError: a peer is gone or did not answer within the time-out.
    """
    (stage,) = stages.values()
    assert not stage.context.sequence_parallel, "a pass of one token can't be cut over tp"
    with in_eval_mode([stage]):
        replica = _Replica(stage, mesh, spec, limits)
        leader = _Leader(replica, spec, desk) if mesh.pp.rank == 0 and mesh.tp.rank == 0 else None
        replica.run(leader)


class _Replica:
    """This rank in its replica.

    Attributes:
        groups: of rows, as many as pipeline ranks.
        flight: by group, its last turn's passes whose results this rank has not taken yet; with one pipeline rank none.
    """

    def __init__(self, stage: Stage, mesh: Mesh, spec: RunSpec, limits: Limits) -> None:
        self._stage, self._mesh, self._ring = stage, mesh, Ring(mesh)
        self.config, self.limits = spec.transformer, limits
        self._device = stage.context.device
        self._draws = mesh.pp.rank == mesh.pp.size - 1
        rows = -(-limits.slots // mesh.pp.size)
        pieces = limits.pieces or _pieces(spec.transformer, self._device.type)
        self.groups: list[RowGroup] = []
        self._passes = []
        for _ in range(mesh.pp.size):
            cache = RowCache(rows, min(limits.context, spec.transformer.max_seq_len), spec.transformer, stage.context)
            self.groups.append(RowGroup(rows, limits.context, cache, pieces, self.groups))
            self._passes.append(Passes(stage, cache, spec.transformer.vocab_size))
        self.flight: list[list[tuple[Pass, Tensor]]] = [[] for _ in self.groups]
        self._is_ended = False

    def run(self, leader: "_Leader | None") -> None:
        """Take turns until the leader ends it."""
        for turn in count():
            number = turn % len(self.groups)
            self._turn(turn, number, leader)
            if self._is_ended:
                break
        self._ring.finish()

    def _turn(self, turn: int, number: int, leader: "_Leader | None") -> None:
        self._ring.settle(turn - 2 * len(self.groups))  # it has arrived long since, or its receiver has not begun this
        events = self._land(turn, number)
        if leader is not None:
            leader.tell(events)
        orders = self._hear(turn, [] if leader is None else leader.orders(number))
        group = self.groups[number]
        for order in orders:
            if isinstance(order, Request):
                group.join(order)
            elif isinstance(order, Cancel):
                group.cancel(order.request)
            else:
                self._is_ended = True
        for step in group.passes():
            found = self._run(turn, self._passes[number], step)
            if self._mesh.pp.size > 1:
                self.flight[number].append((step, found))
            else:
                events = group.take(step, decoded(found))
                if leader is not None:
                    leader.tell(events)

    def _land(self, turn: int, number: int) -> list[Event]:
        """Take what the group's last turn has found; return the events of it."""
        events: list[Event] = []
        for step, found in self.flight[number]:
            if not self._draws:
                self._ring.receive(found, self._ring.previous)
                if self._mesh.pp.rank + 1 < self._mesh.pp.size - 1:
                    self._ring.send(found, self._ring.next, turn)
            events += self.groups[number].take(step, decoded(found))
        self.flight[number] = []
        return events

    def _run(self, turn: int, passes: Passes, step: Pass) -> Tensor:
        """Compute a pass; return what it has found, on ranks before the last stage the room for it."""
        hidden: Tensor | None = None
        if self._mesh.pp.rank > 0:
            shape = (len(step.rows), step.new, self._stage.config.hidden_size)
            hidden = self._ring.receive(
                torch.empty(shape, dtype=self._stage.context.dtype, device=self._device), self._ring.previous
            )
        hidden = passes.extend(step, hidden)
        if not self._draws:
            self._ring.send(hidden, self._ring.next, turn)
            return torch.empty(step.shape, dtype=torch.int64, device=self._device)
        found = passes.find(step, hidden)
        if self._mesh.pp.size > 1:
            self._ring.send(found, self._ring.next, turn)
        return found

    def _hear(self, turn: int, orders: Sequence[Order]) -> list[Order]:
        """Return the leader's orders on every rank. Collective over the pipeline and the tp group."""
        if self._mesh.pp.size == self._mesh.tp.size == 1:
            return list(orders)
        data = b"".join(map(encode_order, orders))
        (length,) = self._exchange(turn, torch.tensor([len(data)])).tolist()
        if not length:
            return []
        padded = bytearray(data.ljust(-(-length // _WORD) * _WORD))
        words = torch.frombuffer(padded, dtype=torch.int64) if data else torch.zeros(len(padded) // _WORD).long()
        data = self._exchange(turn, words).cpu().numpy().tobytes()[:length]
        return [decode_order(line) for line in data.splitlines()]

    def _exchange(self, turn: int, words: Tensor) -> Tensor:
        """Return the leader's numbers on every rank; those of others are zeros of the same shape."""
        x, ring = words.to(self._device), self._ring
        if self._mesh.pp.rank == 0:
            all_reduce(x, self._mesh.tp)
        else:
            ring.receive(x, ring.previous)
        if self._mesh.pp.rank < self._mesh.pp.size - 1:
            ring.send(x, ring.next, turn)
        return x


class _Leader:
    """What the leader of a replica knows more than its other ranks: the requests that wait, and who has ended."""

    def __init__(self, replica: _Replica, spec: RunSpec, desk: Desk) -> None:
        self._replica, self._desk, self._config = replica, desk, spec.transformer
        self._context = replica.limits.context
        self._pause_s = spec.launcher.timeout_s / _HEARTBEATS
        self._waiting: deque[Request] = deque([self._warm_up()])
        self._place: dict[int, int] = {}  # request -> its group
        self._cancelled: set[int] = set()
        self._is_ending = False

    def orders(self, number: int) -> list[Order]:
        """Return the orders of a turn of a group; waits for one, for a time, where nothing goes on."""
        is_idle = not (self._place or self._waiting or any(self._replica.flight))
        if is_idle and self._is_ending:
            return [End()]
        # The wait is before a first group's turn alone: the others' orders are the same heartbeat.
        self._take(self._desk.poll(self._pause_s if is_idle and number == 0 else 0.0))
        cancelled = [each for each in self._cancelled if self._place.get(each) == number]
        for request in cancelled:
            del self._place[request]
        self._cancelled -= set(cancelled)
        return [*map(Cancel, cancelled), *self._joining(number, len(cancelled))]

    def tell(self, events: Sequence[Event]) -> None:
        """Tell the desk of events, but for those of the ranks' own request."""
        for event in events:
            if isinstance(event, Finished | Failed):
                self._place.pop(event.request, None)
                self._cancelled.discard(event.request)
                if event.request == _WARM_UP:
                    rows = sum(len(group.rows) for group in self._replica.groups)
                    self._desk.ready(Ready(rows, self._context))
        told = [event for event in events if event.request >= 0]
        if told:
            self._desk.tell(told)

    def _take(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Request):
                problem = "" if not self._is_ending else "the ranks are ending"
                problem = problem or problem_of(order, self._config, self._context)
                if problem:
                    self._desk.tell([Failed(order.id, problem)])
                elif order.sampling.max_new_tokens == 0 and not order.scores_prompt:
                    self._desk.tell([PromptScores(order.id), Finished(order.id, "length")])
                else:
                    self._waiting.append(order)
            elif isinstance(order, Cancel):
                self._cancel(order.request)
            else:
                self._is_ending = True
                for request in [*self._place, *(each.id for each in self._waiting)]:
                    self._cancel(request)

    def _cancel(self, request: int) -> None:
        if request in self._place:
            self._cancelled.add(request)
        else:
            self._waiting = deque(each for each in self._waiting if each.id != request)

    def _joining(self, number: int, left: int) -> list[Request]:
        """Return the waiting requests that join a group: the first ones, while it is the best place for them.

        Args:
            left: rows that the orders before free.
        """
        joining: list[Request] = []
        groups = self._replica.groups
        while self._waiting:
            free = [group.free for group in groups]
            free[number] += left - len(joining)
            if not free[number] or self._best(self._waiting[0], free, number) != number:
                break
            request = self._waiting.popleft()
            self._place[request.id] = number
            joining.append(request)
        return joining

    def _best(self, request: Request, free: Sequence[int], number: int) -> int:
        """Return the group for a request: one that has much of its prompt, or else one with the most free rows."""
        if len(free) == 1:
            return 0
        groups = self._replica.groups
        known = [group.known(request.prompt) if room else 0 for group, room in zip(groups, free, strict=True)]
        if max(known) >= _PREFERRED:
            return known.index(max(known))
        return number if free[number] == max(free) else free.index(max(free))

    def _warm_up(self) -> Request:
        """Return a request of the ranks themselves, so that the first one of others finds everything in place."""
        tokens = max(1, min(_WARM_TOKENS, self._context - 2))
        prompt = tuple(number % self._config.vocab_size for number in range(tokens))
        return Request(_WARM_UP, prompt, SamplingParams(2, context="stop"))


def problem_of(request: Request, config: TransformerConfig, context: int) -> str:
    """Return why a request can't be served, in a sentence; "" if it can."""
    if request.sampling.context != "stop":
        return f"sampling.context ({request.sampling.context}) must be stop: a served text never slides"
    if (request.top_logprobs or 0) > config.vocab_size:
        return f"top_logprobs ({request.top_logprobs}) must be at most {config.vocab_size}, the model's vocabulary"
    if len(request.prompt) > context:
        return (
            f"the prompt has {len(request.prompt)} tokens, more than the {context} of the context that is served; "
            "shorten it"
        )
    try:
        check_prompts([request.prompt], config)
    except ValueError as error:
        return str(error)
    wrong = [token for token in request.sampling.stop_tokens if not 0 <= token < config.vocab_size]
    return f"the stop token {wrong[0]} is not in the model's vocabulary of {config.vocab_size}" if wrong else ""


def _pieces(config: TransformerConfig, device: str) -> Pieces:
    """Return how much of prompts is read at once on a kind of device."""
    return Pieces(_ALONE[device], _AMONG[device], longest_shared(config))
