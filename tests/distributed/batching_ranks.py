"""What the tests of continuous batching run on ranks: a desk with a timetable, and the same requests one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.distributed import test_generate
from tests.distributed.test_generate import ROTARY, VOCAB
from trimaran.models.transformer import Stage
from trimaran.runtime.infer.batching.messages import Event, Failed, Finished, NewToken, PromptScores, Request
from trimaran.runtime.infer.batching.orders import Cancel, End, Order, Ready
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec

CONTEXT = 48

Watch = Callable[["TimetableDesk", list[Event]], Sequence[Order]]


def make(parallel: dict[str, Any], model: dict[str, Any] | None = None) -> tuple[RunSpec, Mesh, dict[int, Stage]]:
    return test_generate.make(parallel, ROTARY | {"num_layers": 2, "max_seq_len": CONTEXT} | (model or {}))


@dataclass
class TimetableDesk:
    """Gives each order at its poll, and End once every request has ended.

    Args:
        timetable: (poll, order), in order.
        watch: called with the events of each `tell`; returns further orders.
    """

    timetable: list[tuple[int, Order]]
    watch: Watch | None = None
    events: list[Event] = field(default_factory=list)
    answers: dict[int, list[Event]] = field(default_factory=dict)
    ready_with: Ready | None = None
    polls: int = 0
    longest_wait_s: float = 0.0
    open: set[int] = field(default_factory=set)

    def poll(self, timeout_s: float) -> list[Order]:
        if self.ready_with is None:
            return []
        self.polls += 1
        self.longest_wait_s = max(self.longest_wait_s, timeout_s)
        due = [order for at, order in self.timetable if at <= self.polls]
        if not due and timeout_s > 0 and self.timetable:  # nothing goes on: no use in waiting
            self.polls = self.timetable[0][0]
            due = [self.timetable[0][1]]
        self.timetable = self.timetable[len(due) :]
        for order in due:
            self._note(order)
        return due if due or self.open or self.timetable else [End()]

    def ready(self, ready: Ready) -> None:
        self.ready_with = ready

    def tell(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            self.answers.setdefault(event.request, []).append(event)
            if isinstance(event, Finished | Failed):
                self.open.discard(event.request)
        if self.watch is not None:
            self.timetable[:0] = [(self.polls, order) for order in self.watch(self, events)]

    def _note(self, order: Order) -> None:
        if isinstance(order, Request):
            self.open.add(order.id)
        elif isinstance(order, Cancel):
            self.open.discard(order.request)


Text = tuple[list[int], str, list[float]]
"""Tokens, why they ended, log-probabilities."""


def text_of(events: Sequence[Event]) -> Text:
    """The tokens, the end and the log-probabilities of one request; checks the order of its events."""
    first, *tokens, last = events
    assert isinstance(first, PromptScores)
    assert isinstance(last, Finished), last
    found = [each for each in tokens if isinstance(each, NewToken)]
    assert len(found) == len(tokens)
    return [each.token for each in found], last.finish, [each.logprob or 0.0 for each in found]


def alone(spec: RunSpec, mesh: Mesh, stages: dict[int, Stage], request: Request) -> Text:
    """What `generate` gives for a request by itself. Its log-probabilities are at temperature 1."""
    (completion,) = generate(
        stages, mesh, spec, [request.prompt], request.sampling, numbers=[request.sample], tells_log_probs=True
    )
    return completion.tokens, completion.finish, completion.log_probs


SETTINGS = {
    "greedy": SamplingParams(12, temperature=0.0, context="stop"),
    "drawn": SamplingParams(20, temperature=1.0, seed=3, context="stop"),
    "filtered": SamplingParams(
        15, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=4, context="stop"
    ),
    "penalties": SamplingParams(
        15, temperature=1.0, top_k=9, seed=5, presence_penalty=0.7, frequency_penalty=1.3, context="stop"
    ),
    "stopping": SamplingParams(
        30, temperature=1.0, top_p=0.5, seed=6, min_new_tokens=3, stop_tokens=tuple(range(20)), context="stop"
    ),
    "long": SamplingParams(80, temperature=0.0, repetition_penalty=1.5, context="stop"),
}


def requests(seed: int = 1, count: int = 12) -> list[Request]:
    """Requests of every setting, with prompts of 1 to 30 tokens, some of which begin alike."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(1, 31, (1,), generator=generator))
        prompt = tuple(torch.randint(VOCAB, (length,), generator=generator).tolist())
        if number % 3 == 1:
            prompt = (found[-1].prompt + prompt)[:40]
        setting = list(SETTINGS)[number % len(SETTINGS)]
        found.append(Request(number, prompt, SETTINGS[setting], sample=number, top_logprobs=(None, 0, 3)[number % 3]))
    return found


def timetable(wanted: Sequence[Request], seed: int = 2, most: int = 5) -> list[tuple[int, Order]]:
    """The requests at random polls."""
    generator = torch.Generator().manual_seed(seed)
    at, found = 0, []
    for request in wanted:
        found.append((at, request))
        at += int(torch.randint(most, (1,), generator=generator))
    return found


def with_logprobs(request: Request) -> Request:
    return replace(request, top_logprobs=0)
