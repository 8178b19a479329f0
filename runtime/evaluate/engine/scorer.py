"""Scorer: rank 0 asks, and the dp replicas of the model, each of tp x pp ranks, answer.

All other ranks are in `serve` meanwhile. A call of the scorer is divided into jobs, the longest first. The leader of a
replica, its first rank, takes the next one that nobody has, and the job's number goes through the pipeline ahead of the
hidden states, so a stage begins a job while later stages are still in the one before.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal, Self

from trimaran.models.config import TransformerConfig
from trimaran.runtime.evaluate.engine.batches import divide
from trimaran.runtime.evaluate.engine.continue_text import divide_continuations
from trimaran.runtime.evaluate.engine.exchange import (
    decode_likelihoods,
    decode_scores,
    encode_likelihoods,
    encode_scores,
)
from trimaran.runtime.evaluate.engine.replica import (
    Call,
    Engine,
    Numbered,
    Replica,
    decode_continuations,
    encode_continuations,
)
from trimaran.runtime.evaluate.engine.requests import AskedToStop, Continuation, Likelihood, LikelihoodScore, ignore
from trimaran.runtime.evaluate.engine.score import check_causal
from trimaran.runtime.infer.sample_group import NotFiniteError

_JOBS_PER_REPLICA = 8  # so that the last replica to finish is not far behind
_JOB_TOKENS = 1 << 16  # about the longest job
_POLL_S = 0.05  # between two looks for answers while rank 0 computes


class Scorer:
    """The model as rank 0 sees it; see `requests.ScorerProtocol`. Use it as a context, or call `close`.

    To make one is collective over the world: the other ranks call `serve`.

    Args:
        batch_size: most different sequences of a batch; "auto": as many as the free memory has room for.

    Raises:
        ValueError: the model is not causal, or the batch size is not positive.
    """

    def __init__(self, engine: Engine, batch_size: int | Literal["auto"] = "auto") -> None:
        check_causal(engine.spec.transformer)
        if batch_size != "auto" and batch_size < 1:
            raise ValueError(f"the batch size ({batch_size}) must be auto, or a whole number of at least 1")
        self._most = None if batch_size == "auto" else batch_size
        self._engine, self._replica, self._num_calls = engine, Replica(engine), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        """Return the log-likelihoods, those of every token too, in the order of the requests.

        Args:
            done: called with the number of a request and its score as they arrive.

        Raises:
            ValueError: a request is empty, too long or outside the vocabulary.
            NotFiniteError: the logits are not finite; names the request.
            AskedToStop: a rank was asked to stop (Engine.stop).
        """
        most = self._engine.spec.transformer.max_seq_len + 1
        for number, request in enumerate(requests):
            _check(number, request.context, "context", most - 1, self._engine.spec.transformer)
            _check(
                number, request.continuation, "continuation", most - len(request.context), self._engine.spec.transformer
            )
        length = sum(len(each.context) + len(each.continuation) for each in requests)
        parts = divide(requests, self._num_parts(length))
        jobs = [[requests[number] for number in part] for part in parts]
        call = self._call("likelihoods", len(jobs), self._replica.budget.tokens)
        return self._run(call, jobs, parts, encode_likelihoods, decode_scores, done)

    def continuations(self, requests: Sequence[Continuation], done: Callable[[int, str], None] = ignore) -> list[str]:
        """Return the texts that continue the contexts, in the order of the requests; the arguments as above.

        Raises:
            ValueError: a context is empty, too long or outside the vocabulary.
            NotFiniteError: the logits are not finite; names the request.
            AskedToStop: a rank was asked to stop (Engine.stop).
        """
        config = self._engine.spec.transformer
        for number, request in enumerate(requests):
            _check(number, request.context, "context", config.max_seq_len, config)
        parts = divide_continuations(requests, self._most, self._replica.budget, config.max_seq_len)
        jobs = [[Numbered(number, requests[number]) for number in part] for part in parts]
        call = self._call("continuations", len(jobs), 1)
        return self._run(call, jobs, parts, encode_continuations, lambda data, _: _decode_texts(data), done)

    def close(self, *, stopped: bool = False) -> None:
        """Let the other ranks leave `serve`, which returns `stopped` there."""
        if self._replica.board is not None and self._num_calls >= 0:
            self._announce(self._call("close", int(stopped), 1))
        self._num_calls = -1

    def _num_parts(self, num_tokens: int) -> int:
        """Return into how many jobs a call of likelihoods is divided."""
        if self._replica.board is None:
            return 1
        return max(_JOBS_PER_REPLICA * self._engine.mesh.dp.size, num_tokens // _JOB_TOKENS)

    def _call(self, kind: str, num_jobs: int, tokens: int) -> Call:
        assert self._num_calls >= 0, "the scorer is closed"
        return Call(self._num_calls, kind, num_jobs, tokens, self._most)

    def _announce(self, call: Call) -> None:
        assert self._replica.board is not None
        self._replica.board.put(str(call.number), json.dumps(asdict(call)).encode())

    def _run(
        self,
        call: Call,
        jobs: Sequence[Sequence[Any]],
        parts: Sequence[Sequence[int]],
        encode: Callable[[Any], bytes],
        decode: Callable[[bytes, Any], Sequence[Any]],
        done: Callable[[int, Any], None],
    ) -> list[Any]:
        """Announce a call, take part in it, and return the answers to all requests."""
        board = self._replica.board
        collected = _Collected(parts, done)
        looked = time.monotonic()

        def accept(job: int, number: int, answer: Any) -> None:
            if collected.add(job, number, answer) and board is not None:
                board.count(call.name("next"), call.num_jobs)  # nobody takes another job

        def look() -> None:
            """Take the answers that other ranks have written."""
            nonlocal looked
            if board is None or time.monotonic() - looked < _POLL_S:
                return
            taken = call.num_jobs if self._engine.in_step else board.count(call.name("next"), 0)
            for job in sorted(collected.missing):
                if job < taken and (data := board.find(call.name("answer", job))) is not None:
                    for number, answer in enumerate(decode(data, jobs[job])):
                        accept(job, number, answer)
            looked = time.monotonic()

        if board is not None:
            for number, job in enumerate(jobs):
                board.put(call.name("job", number), encode(job))
            self._announce(call)
        self._num_calls += 1
        self._replica.run(call, jobs.__getitem__, accept, look)
        while collected.missing and collected.failed is None and not self._replica.must_stop(call):
            time.sleep(_POLL_S / 10)
            looked = 0.0
            look()
        if collected.failed is not None:
            raise collected.failed
        if board is not None:
            while board.count(call.name("left"), 0) < self._engine.mesh.world_size - 1:
                time.sleep(_POLL_S / 10)
        if collected.missing:
            raise AskedToStop
        if board is not None:
            board.remove([call.name(what, job) for what in ("job", "answer") for job in range(call.num_jobs)])
        return collected.in_order()


class _Collected:
    """The answers to the requests of a call.

    Args:
        parts: the numbers of the requests of each job.

    Attributes:
        missing: jobs that are not answered yet.
        failed: the error about the first request whose logits are not finite.
    """

    def __init__(self, parts: Sequence[Sequence[int]], done: Callable[[int, Any], None]) -> None:
        self._parts, self._done = parts, done
        self._answers: dict[int, Any] = {}
        self._unanswered = {job: len(part) for job, part in enumerate(parts)}
        self.failed: NotFiniteError | None = None

    @property
    def missing(self) -> set[int]:
        return set(self._unanswered)

    def add(self, job: int, number: int, answer: Any) -> bool:
        """Add an answer; return whether it is the first that shows logits which are not finite."""
        request = self._parts[job][number]
        self._unanswered[job] -= 1
        if self._unanswered[job] == 0:
            del self._unanswered[job]
        wrong = isinstance(answer, NotFiniteError) or (
            isinstance(answer, LikelihoodScore) and math.isnan(answer.log_likelihood)
        )
        if not wrong:
            self._answers[request] = answer
            self._done(request, answer)
            return False
        if self.failed is not None:
            return False
        self.failed = NotFiniteError(
            f"the model's logits for request {request + 1} of {sum(map(len, self._parts))} are not finite; the "
            "weights hold infinite values or NaN, or precision.dtype is too narrow for them",
            request,
        )
        return True

    def in_order(self) -> list[Any]:
        """Return all answers in the order of the requests."""
        return [self._answers[number] for number in range(len(self._answers))]


def serve(engine: Engine) -> bool:
    """Answer rank 0's scorer on every other rank, until it is closed; return whether a rank was asked to stop.

    Collective over the world.

    Between two calls a rank waits as long as rank 0 lives.
    """
    replica = Replica(engine)
    board = replica.board
    assert board is not None, "rank 0 asks, the others serve"
    number = 0
    while (call := Call(**json.loads(board.wait(str(number))))).kind != "close":
        kept = _Kept(call, board)
        replica.run(call, kept.fetch, kept.answer, lambda: None)
        board.count(call.name("left"))  # rank 0 may remove the jobs
        number += 1
    return call.num_jobs > 0


class _Kept:
    """The answers of a rank to the jobs of a call, each written when it is whole."""

    def __init__(self, call: Call, board: Any) -> None:
        self._call, self._board = call, board
        self._lengths: dict[int, int] = {}
        self._answers: dict[int, dict[int, Any]] = {}

    def fetch(self, job: int) -> Sequence[Any]:
        """Return the requests of a job."""
        data = self._board.get(self._call.name("job", job))
        requests: Sequence[Any] = (
            decode_likelihoods(data) if self._call.kind == "likelihoods" else decode_continuations(data)
        )
        self._lengths[job] = len(requests)
        return requests

    def answer(self, job: int, number: int, answer: Any) -> None:
        """Take an answer; write those of the job once all are there."""
        answers = self._answers.setdefault(job, {})
        answers[number] = answer
        if len(answers) == self._lengths[job]:
            found = [answers[number] for number in range(len(answers))]
            encode = encode_scores if self._call.kind == "likelihoods" else _encode_texts
            self._board.put(self._call.name("answer", job), encode(found))
            del self._answers[job]


def _encode_texts(texts: Sequence[str | NotFiniteError]) -> bytes:
    return json.dumps([None if isinstance(text, NotFiniteError) else text for text in texts]).encode()


def _decode_texts(data: bytes) -> list[str | NotFiniteError]:
    return [NotFiniteError() if text is None else text for text in json.loads(data)]


def _check(number: int, tokens: Sequence[int], what: str, most: int, config: TransformerConfig) -> None:
    """Raise ValueError for tokens of a request that the model can't read."""
    if not 1 <= len(tokens) <= most:
        raise ValueError(
            f"the {what} of request {number + 1} has {len(tokens)} tokens, and it must have from 1 to {most}: context "
            f"and continuation fit a context of {config.max_seq_len} (model.max_seq_len)"
        )
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise ValueError(
            f"the {what} of request {number + 1} has the token {wrong}, and the model's vocabulary has "
            f"{config.vocab_size}; its tokenizer is not this one"
        )
