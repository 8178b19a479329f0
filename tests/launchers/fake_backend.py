"""A model's ranks that answer by rule, for tests of those who talk to them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from trimaran.runtime.infer.batching.messages import (
    BackendGoneError,
    Event,
    Failed,
    Finished,
    NewToken,
    PromptScores,
    Request,
)


@dataclass
class FakeBackend:
    """Answers each prompt with the tokens that `answer` returns for it.

    Like real ranks it keeps the keys and values of what it has computed, of the last text alone.

    Attributes:
        requests: all that were submitted.
        ended: ids of requests whose place is free again.
        holds_after: tokens after which an answer waits for `release`, None for never.
    """

    answer: Callable[[Request], Sequence[int]]
    context: int = 1000
    slots: int = 2
    requests: list[Request] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    holds_after: int | None = None
    held: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    fails: str | None = None
    is_gone: bool = False
    kept: tuple[int, ...] = ()
    running: int = 0
    most_running: int = 0

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        """Answer a prompt."""
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        drawn: list[int] = []
        try:
            if self.is_gone:
                raise BackendGoneError("rank 0 was killed")
            if self.fails is not None:
                yield Failed(request.id, self.fails)
                return
            pairs = zip(self.kept, request.prompt[:-1], strict=False)
            cached = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
            cached = min(len(self.kept), len(request.prompt) - 1) if cached is None else cached
            yield PromptScores(request.id, cached)
            most = min(request.sampling.max_new_tokens, self.context - len(request.prompt))
            for token in self.answer(request)[:most]:
                if len(drawn) == self.holds_after:
                    self.held.set()
                    await self.release.wait()
                await asyncio.sleep(0)
                drawn.append(token)
                yield NewToken(request.id, token)
            whole = len(drawn) == len(self.answer(request))
            if whole:  # as ranks do, which draw it like any other
                yield NewToken(request.id, request.sampling.stop_tokens[0])
            yield Finished(request.id, "stop_token" if whole else "length")
        finally:
            self.running -= 1
            self.kept = (*request.prompt, *drawn[:-1])
            self.ended.append(request.id)

    async def close(self, drain_s: float = 0.0) -> None:
        """End."""
        self.is_gone = True
