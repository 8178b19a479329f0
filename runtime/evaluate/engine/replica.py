"""What every rank of a dp replica does in an evaluation: take jobs, and pass their batches through its stages."""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from trimaran.models.parallel.group import all_reduce
from trimaran.models.transformer import Stage
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.batches import LikelihoodBatch, Limits, batches
from trimaran.runtime.evaluate.engine.budget import measured_budget
from trimaran.runtime.evaluate.engine.continue_text import continue_texts
from trimaran.runtime.evaluate.engine.exchange import Board, score_of
from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood, LikelihoodScore
from trimaran.runtime.evaluate.engine.score import score
from trimaran.runtime.infer.generate import longest_shared
from trimaran.runtime.infer.ring import Ring
from trimaran.runtime.infer.sample_group import NotFiniteError
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.schedule import Placement, round_robin
from trimaran.runtime.spec import RunSpec

_MANY = 1 << 32  # more requests than a job has
_IN_FLIGHT = 2  # numbers that a rank has sent and not waited for
_POLL_S = 0.05  # between two looks whether another rank was asked to stop


@dataclass(frozen=True, eq=False)
class Engine:
    """What a rank brings to an evaluation.

    Args:
        tokenizer: for texts that are continued; None where none is.
        store: of this start; None for a single rank.
        placement: stage -> pipeline rank; by default the stages go round the ranks.
        in_step: whether the dp replicas must pass through the layers together (experts spread over ep, parameters
            shared out by ZeRO): then all of them compute the same.
        stop: whether this rank was asked to stop; given on all ranks or on none. The requests are left between two
            batches then, and the scorer raises AskedToStop.
    """

    stages: dict[int, Stage]
    mesh: Mesh
    spec: RunSpec
    tokenizer: Tokenizer | None = None
    store: Store | None = None
    placement: Placement | None = None
    in_step: bool = False
    stop: Callable[[], bool] | None = None

    @property
    def stage_ranks(self) -> Placement:
        """Stage -> pipeline rank."""
        if self.placement is not None:
            return self.placement
        return round_robin(self.mesh.pp.size, self.spec.num_stages // self.mesh.pp.size)


@dataclass(frozen=True)
class Call:
    """A call of the scorer, as all ranks know it.

    Args:
        number: of the call.
        kind: "likelihoods", "continuations", or "close", the last one.
        num_jobs: what it is divided into.
        tokens, sequences: see batches.Limits.
    """

    number: int
    kind: str
    num_jobs: int = 0
    tokens: int = 1
    sequences: int | None = None

    def name(self, what: str, job: int | None = None) -> str:
        """Return the name of something of this call, or of one of its jobs, on the board."""
        return f"{self.number}/{what}" if job is None else f"{self.number}/{what}/{job}"


@dataclass(frozen=True, slots=True)
class Numbered:
    """A text to continue, with its number among all of the call."""

    number: int
    request: Continuation


Answer = Callable[[int, int, Any], None]
"""Takes the job, the request's number in it, and the score, the text, or a NotFiniteError."""


class Replica:
    """This rank in its replica. Collective over the world.

    Attributes:
        board: None for a single rank.
        budget: of the ranks' memory, measured anew for each replica.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.board: Board | None = None
        if engine.mesh.world_size > 1:
            assert engine.store is not None, "ranks exchange work through the store of their start"
            names = engine.mesh.gather_text(secrets.token_hex(8) if engine.mesh.rank == 0 else "")
            self.board = Board(engine.store, names[0])
        mesh = engine.mesh
        self.budget = measured_budget(engine.stages, mesh, engine.spec.transformer)
        self._looked = -math.inf
        self._is_leader = mesh.pp.rank == 0 and mesh.tp.rank == 0
        self._reports = mesh.tp.rank == 0 and not (engine.in_step and mesh.dp.rank > 0)

    def run(
        self, call: Call, fetch: Callable[[int], Sequence[Any]], answer: Answer, meanwhile: Callable[[], None]
    ) -> None:
        """Do jobs of a call until none is left. Collective over the pipeline and the tp group.

        Args:
            fetch: returns the requests of a job.
            answer: called on one rank of the replica: the first of the last stage for likelihoods, else the leader.
            meanwhile: called between batches.
        """
        if call.kind == "likelihoods":
            self._likelihoods(call, fetch, answer, meanwhile)
        else:
            self._continuations(call, fetch, answer, meanwhile)

    def must_stop(self, call: Call) -> bool:
        """Whether any rank was asked to stop, as far as this one knows; it tells the others of itself."""
        if self.engine.stop is None:
            return False
        name = call.name("stop")
        if self.engine.stop():
            if self.board is not None:
                self.board.put(name, b"1")
            return True
        if self.board is None or time.monotonic() - self._looked < _POLL_S:
            return False
        self._looked = time.monotonic()
        return self.board.find(name) is not None

    def _jobs(self, call: Call, leader: "_Leader") -> Iterator[int]:
        """Return the numbers of this replica's jobs: its leader takes one, and each stage tells the next."""
        for taken in count():
            stops = self.must_stop(call)  # on every rank, which tells the others
            found = leader.tell(partial(self._take, call, taken, stops))
            if found >= call.num_jobs:
                break
            yield found
        leader.finish()

    def _take(self, call: Call, taken: int, stops: bool) -> int:
        """Return the next job that no replica has taken; one too many where the call is left."""
        if stops:
            return call.num_jobs
        return taken if self.board is None or self.engine.in_step else self.board.count(call.name("next"))

    def _goes_on(self, call: Call, leader: "_Leader") -> bool:
        """Whether this replica computes the next batch of a job; the same on all of its ranks."""
        if self.engine.stop is None:
            return True
        stops = self.must_stop(call)
        return leader.tell(lambda: int(not stops)) == 1

    def _likelihoods(
        self,
        call: Call,
        fetch: Callable[[int], Sequence[Likelihood]],
        answer: Answer,
        meanwhile: Callable[[], None],
    ) -> None:
        config = self.engine.spec.transformer
        limits = Limits(call.tokens, call.sequences, longest_shared=longest_shared(config))
        reports = self._reports and self.engine.spec.num_stages - 1 in self.engine.stages
        waiting: dict[tuple[int, int], _Parts] = {}
        leader = _Leader(self.engine)

        def stream() -> Iterator[LikelihoodBatch]:
            for job in self._jobs(call, leader):
                requests = fetch(job)
                if reports:
                    for number, request in enumerate(requests):
                        waiting[job, number] = _Parts(len(request.continuation))
                for number, batch in enumerate(batches(requests, limits, first=job * _MANY)):
                    if number and not self._goes_on(call, leader):
                        return
                    yield batch
                    meanwhile()

        def take(batch: LikelihoodBatch, log_likelihoods: Sequence[float], is_likeliest: Sequence[bool]) -> None:
            if not reports:
                return
            for target, found, best in zip(batch.targets, log_likelihoods, is_likeliest, strict=True):
                key = divmod(target.request, _MANY)
                if waiting[key].add(target.index, found, best):
                    answer(*key, waiting.pop(key).score())

        score(self.engine.stages, self.engine.mesh, self.engine.stage_ranks, stream(), take)
        leader.finish()

    def _continuations(
        self, call: Call, fetch: Callable[[int], Sequence[Numbered]], answer: Answer, meanwhile: Callable[[], None]
    ) -> None:
        engine = self.engine
        assert engine.tokenizer is not None, "texts are continued with a tokenizer"
        for job in self._jobs(call, _Leader(engine)):
            requests = fetch(job)
            arguments = [each.request for each in requests], [each.number for each in requests]
            try:
                found: Sequence[str | NotFiniteError] = continue_texts(
                    engine.stages, engine.mesh, engine.spec, engine.stage_ranks, engine.tokenizer, *arguments
                )
            except NotFiniteError as error:
                found = [error] * len(requests)
            if self._is_leader and self._reports:
                for number, text in enumerate(found):
                    answer(job, number, text)
            meanwhile()


class _Leader:
    """Numbers that the leader of a replica tells its other ranks, ahead of the hidden states."""

    def __init__(self, engine: Engine) -> None:
        self._mesh, self._ring, self._told = engine.mesh, Ring(engine.mesh), 0
        self._in_step = engine.in_step
        self._device = next(iter(engine.stages.values())).context.device

    def tell(self, number: Callable[[], int]) -> int:
        """Return the leader's number, which it alone computes, on every rank of the replica.

        Collective over the pipeline and the tp group; of replicas in step over dp too, and the first one's leader has
        the word.
        """
        mesh, ring = self._mesh, self._ring
        if mesh.pp.rank == 0:
            has_the_word = mesh.tp.rank == 0 and not (self._in_step and mesh.dp.rank)
            found = torch.tensor([number() if has_the_word else 0], device=self._device)
            all_reduce(found, mesh.tp)
            if self._in_step:
                all_reduce(found, mesh.dp)
        else:
            found = ring.receive(torch.empty(1, dtype=torch.int64, device=self._device), ring.previous)
        if mesh.pp.rank < mesh.pp.size - 1:
            ring.send(found, ring.next, self._told)
            ring.settle(self._told - _IN_FLIGHT)
        self._told += 1
        return int(found)

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        self._ring.finish()


class _Parts:
    """The log-likelihoods of a continuation's tokens, as far as they are known."""

    __slots__ = ("_is_greedy", "_log_likelihoods", "_missing")

    def __init__(self, length: int) -> None:
        self._log_likelihoods, self._missing, self._is_greedy = [0.0] * length, length, True

    def add(self, index: int, log_likelihood: float, is_likeliest: bool) -> bool:
        """Add a token; return whether all are known."""
        self._log_likelihoods[index] = log_likelihood
        self._is_greedy = self._is_greedy and is_likeliest
        self._missing -= 1
        return self._missing == 0

    def score(self) -> LikelihoodScore:
        """Return the score."""
        return score_of(self._log_likelihoods, self._is_greedy)


def encode_continuations(requests: Sequence[Numbered]) -> bytes:
    """Return texts to continue as bytes."""
    return json.dumps([[each.number, asdict(each.request)] for each in requests]).encode()


def decode_continuations(data: bytes) -> list[Numbered]:
    """Return the requests of `encode_continuations`."""
    return [
        Numbered(
            number,
            Continuation(
                tuple(fields["context"]),
                tuple(fields["stop_strings"]),
                SamplingParams(
                    **{**fields["sampling"], "stop_tokens": tuple(fields["sampling"]["stop_tokens"])},
                ),
            ),
        )
        for number, fields in json.loads(data)
    ]
