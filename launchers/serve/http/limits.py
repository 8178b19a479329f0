"""What one client can take at most: bytes and seconds of a request, and places in the queue."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trimaran.launchers.serve.errors import ApiError

_BODIES = 16  # whole bodies that may be waited for at the same time; smaller ones may be more
_LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Limits:
    """Bounds of the server, in bytes, seconds and numbers.

    Args:
        max_queue: requests that wait while all slots of the backend are taken.
        body_bytes: of one request.
        request_s: from the end of a request to the end of its answer.
        header_s, body_s: until the head and the body of a request are there.
        stall_s: a client must read some of its answer in that time.
        keep_alive_s: an idle connection is closed after it.
        drain_s: what runs at SIGTERM may take that long.
        connections: open at the same time.
        head_bytes: of the head of a request.
    """

    max_queue: int = 64
    body_bytes: int = 4 << 20
    request_s: float = 600.0
    header_s: float = 10.0
    body_s: float = 30.0
    stall_s: float = 30.0
    keep_alive_s: int = 5
    drain_s: float = 60.0
    connections: int = 512
    head_bytes: int = 32 << 10


class Places:
    """Places that one request holds, of which each is free as soon as its text has ended."""

    def __init__(self, count: int, leave: Callable[[int], None]) -> None:
        self._count, self._leave = count, leave

    def free(self, count: int = 1) -> None:
        """Give places back."""
        count = min(count, self._count)
        self._count -= count
        self._leave(count)

    def free_all(self) -> None:
        """Give back what is left."""
        self.free(self._count)


@dataclass
class Gate:
    """Who may enter the backend: as many texts as it has slots, and as many as may wait.

    Args:
        slots: texts that are continued at the same time.
        max_queue: texts that wait.
        taken: texts that are continued or wait.
    """

    slots: int
    max_queue: int
    taken: int = 0
    _seconds: float = field(default=1.0, repr=False)  # of a text, lately

    @property
    def most(self) -> int:
        """Most texts at the same time."""
        return self.slots + self.max_queue

    @contextmanager
    def enter(self, count: int) -> Iterator[Places]:
        """Take places for the block; ApiError where so many are not free."""
        if self.taken + count > self.most:
            wait = math.ceil(min(_LONGEST_RETRY_S, max(1.0, self._seconds * (self.taken + count) / self.slots)))
            raise ApiError(
                429,
                f"the queue is full: {self.taken} texts are written or wait, of at most {self.most}; "
                f"try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait)},
            )
        self.taken += count
        places, start = Places(count, self._leave), time.monotonic()
        try:
            yield places
            self._seconds += (time.monotonic() - start - self._seconds) / 8
        finally:
            places.free_all()

    def _leave(self, count: int) -> None:
        self.taken -= count


class BodyReader:
    """Reads the bodies of requests, each and all together within bounds."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, declared: str | None, chunks: AsyncIterator[bytes]) -> bytes:
        """Return a body.

        Args:
            declared: the request's Content-Length.

        Raises:
            ApiError: it is too long or too slow, or others take all room that there is for bodies.
        """
        most = self._limits.body_bytes
        if declared is not None and declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
            raise _too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for chunk in chunks:
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > most:
                        raise _too_large(most)
                    if self._held > _BODIES * most:
                        raise ApiError(
                            429,
                            "too many large requests arrive at the same time; try again in 1 s",
                            code="rate_limit_exceeded",
                            headers={"retry-after": "1"},
                        )
                    parts.append(chunk)
        except TimeoutError:
            raise ApiError(
                408, f"the body of the request did not arrive within {self._limits.body_s:g} s", code="timeout"
            ) from None
        finally:
            self._held -= size
        return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than the {most:,} bytes that a request may have (--max-body-bytes); send less",
        code="request_too_large",
    )


Receive = Callable[[], Awaitable[Any]]


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
