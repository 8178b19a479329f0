"""One answer being written: its choices through the backend, while the client is watched."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import cast

from trimaran.launchers.serve.answers import Choice, Piece, Usage
from trimaran.launchers.serve.errors import ApiError
from trimaran.launchers.serve.http.limits import Places, Receive, until_gone
from trimaran.launchers.serve.http.metrics import Metrics
from trimaran.runtime.infer.batching.messages import Backend, BackendGoneError, Event, NewToken, PromptScores

Emit = Callable[[int, Piece], Awaitable[None]]


class ClientGoneError(Exception):
    """The client has closed the connection."""


class Writing:
    """The choices of one request, written together.

    Args:
        places: those that the choices hold; each is freed as its choice ends.
        start_s: when the request had come, in seconds of the monotonic clock.
    """

    def __init__(
        self, backend: Backend, choices: Sequence[Choice], metrics: Metrics, places: Places, start_s: float
    ) -> None:
        self._backend, self._choices, self._metrics, self._places = backend, choices, metrics, places
        self._start_s = start_s

    async def run(self, emit: Emit) -> None:
        """Call `emit` with (choice, piece) for all that is new, until every choice has ended.

        Where it is cancelled or fails, no choice goes on.

        Raises:
            ApiError: the backend can't go on.
            BackendGoneError: its ranks have ended.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._choices)):
                    group.create_task(self._follow(index, emit))
        except* (ApiError, BackendGoneError) as errors:
            first = _first(errors)
        else:
            return
        raise first

    def usage(self, num_prompt_tokens: int, num_prompts: int) -> Usage:
        """Return the numbers of tokens so far; the first choice of a prompt tells what was cached."""
        firsts = self._choices[:: max(1, len(self._choices) // num_prompts)]
        return Usage(
            num_prompt_tokens, sum(each.cached for each in firsts), sum(each.num_new for each in self._choices)
        )

    async def _follow(self, index: int, emit: Emit) -> None:
        choice, metrics = self._choices[index], self._metrics
        first_s = last_s = 0.0
        is_active = False
        events = cast("AsyncGenerator[Event, None]", self._backend.submit(choice.request))
        try:
            async with aclosing(events):
                async for event in events:
                    if not is_active:
                        is_active = True
                        metrics.active += 1
                    if isinstance(event, PromptScores):
                        metrics.cached_tokens += event.cached
                        metrics.prompt_tokens += len(choice.request.prompt)
                    elif isinstance(event, NewToken):
                        metrics.new_tokens += 1
                        last_s = time.monotonic()
                        first_s = first_s or last_s
                        if choice.num_new == 0:
                            metrics.first_token_s.add(last_s - self._start_s)
                    piece = choice.add(event)
                    if piece is not None:
                        await emit(index, piece)
                        if piece.finish is not None:
                            break
        finally:
            metrics.active -= is_active
            self._places.free()
        if choice.num_new > 1:
            metrics.token_s.add((last_s - first_s) / (choice.num_new - 1))


async def watched(work: Awaitable[None], receive: Receive, over: asyncio.Event, timeout_s: float) -> None:
    """Wait for work, which ends where its client has gone, the server ends, or the time is up.

    Args:
        receive: of the request, whose body has been read.
        over: set where the server ends.

    Raises:
        ClientGoneError: the client has closed the connection first.
        ApiError: the time was up, or the server ends.
    """
    task = asyncio.ensure_future(work)
    gone, end = asyncio.ensure_future(until_gone(receive)), asyncio.ensure_future(over.wait())
    try:
        await asyncio.wait({task, gone, end}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        is_gone, is_over = gone.done(), end.done()
        if task.done():
            await task
            return
    finally:
        for each in (task, gone, end):
            each.cancel()
        await asyncio.gather(task, gone, end, return_exceptions=True)
    if is_gone:
        raise ClientGoneError
    if is_over:
        raise ApiError(503, "this server has stopped before the answer was complete", code="draining")
    raise ApiError(504, f"the answer was not complete within {timeout_s:g} s (--timeout)", code="timeout")


def _first(errors: BaseExceptionGroup[ApiError | BackendGoneError]) -> ApiError | BackendGoneError:
    """Return the first error in a group."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
