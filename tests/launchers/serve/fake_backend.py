"""A backend without a model: it writes tokens by a rule, in as many slots as it has, and counts who is in it."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence

from trimaran.runtime.infer.batching.messages import (
    BackendGoneError,
    Event,
    Failed,
    Finished,
    NewToken,
    PromptScores,
    Request,
    TopLogprobs,
)

Rule = Callable[[Request, int], int]
"""The next token of a request, by how many it has."""


class FakeBackend:
    """Writes the tokens of a rule.

    Args:
        rule: what is written.
        step_s: seconds of a token.
        hold: where it is not set, nobody goes beyond the prompt.

    Attributes:
        active, waiting: requests in slots, and before them.
        left: requests whose iterator was closed before its end.
        seen: every request.
    """

    def __init__(self, rule: Rule, *, slots: int = 4, context: int = 64, step_s: float = 0.0) -> None:
        self.slots, self.context, self.step_s, self.rule = slots, context, step_s, rule
        self.active = self.waiting = self.left = self.most_active = 0
        self.seen: list[Request] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.fails_with: str | None = None
        self.fails_after = 0
        self.is_gone = False
        self._slots = asyncio.Semaphore(slots)

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self.is_gone:
            raise BackendGoneError("rank 1 was killed by SIGKILL")
        self.seen.append(request)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        is_whole = False
        try:
            yield self._scores(request)
            await self.hold.wait()
            for number in range(request.sampling.max_new_tokens):
                await asyncio.sleep(self.step_s)
                if self.fails_with is not None and number >= self.fails_after:
                    yield Failed(request.id, self.fails_with)
                    return
                if self.is_gone:
                    raise BackendGoneError("rank 1 was killed by SIGKILL")
                token = self.rule(request, number)
                yield NewToken(request.id, token, *_scored(token, request.top_logprobs))
                if token in request.sampling.stop_tokens:
                    is_whole = True
                    yield Finished(request.id, "stop_token")
                    return
            is_whole = True
            yield Finished(request.id, "length")
        finally:
            self.left += not is_whole
            self.active -= 1
            self._slots.release()

    async def close(self, drain_s: float = 0.0) -> None:
        self.is_gone = True

    def _scores(self, request: Request) -> PromptScores:
        if not request.scores_prompt:
            return PromptScores(request.id, cached=1)
        scored = [_scored(token, request.top_logprobs) for token in request.prompt[1:]]
        return PromptScores(request.id, 0, tuple(each[0] or 0.0 for each in scored), tuple(each[1] for each in scored))


def logprob_of(token: int) -> float:
    """The log-probability that this backend tells of every token, wherever it stands."""
    return -math.log(2 + token)


def _scored(token: int, top: int | None) -> tuple[float | None, TopLogprobs]:
    if top is None:
        return None, ()
    return logprob_of(token), tuple((each, logprob_of(each)) for each in range(top))


def writes(tokens: Sequence[int]) -> Rule:
    """Return the rule that writes some tokens again and again."""
    return lambda request, number: tokens[number % len(tokens)]
