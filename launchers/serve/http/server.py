"""The HTTP server around the application: bounded connections, and an end that lets what runs finish.

It needs the package uvicorn (pip install trimaran[serve]).
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimaran.launchers.serve.http.limits import Limits
from trimaran.launchers.serve.http.security import App
from trimaran.launchers.serve.http.state import State

_POLL_S = 0.05
_LAST_S = 5  # for connections that are open when nothing runs any more
_LEAST_READ = 16 << 10  # bytes of its answer that a client must read in `stall_s`


class BoundedConnection(H11Protocol):
    """A connection whose client can't hold it for ever by sending or reading slowly.

    Args:
        limits: of the server; the others are uvicorn's.
    """

    def __init__(self, limits: Limits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or end it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every client that reads slowly
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request; a second one before the first is answered ends the connection.

        Nobody would see that the client is gone while its next request waits to be read. The parser measures only what
        is not whole yet, so it gets no more at a time than a head, or the line before a chunk, may have.
        """
        while data and not self.transport.is_closing():
            room = max(1, self._limits.head_bytes - len(self.conn.trailing_data[0]))
            self._take(data[:room])
            data = data[room:]

    def _take(self, data: bytes) -> None:
        if self._answers() and not self.cycle.more_body:
            if data.strip(b"\r\n"):
                self.transport.abort()
            return
        super().data_received(data)
        if self._answers():
            self._end_timer("head")
            if not self.cycle.more_body and self.conn.trailing_data[0].strip(b"\r\n"):
                self.transport.abort()
        elif "head" not in self._timers:
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request; where the answer to one has been sent, end the connection alone."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_timer("head")
        self._end_timer("reader")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Go on, as the client has read all."""
        self._end_timer("reader")
        super().resume_writing()

    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._timers["head"] = self.loop.call_later(self._limits.header_s, self.transport.abort)

    def _wait_for_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._timers["reader"] = self.loop.call_later(self._limits.stall_s, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > max(0, before - _LEAST_READ):
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _end_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


class _Server(uvicorn.Server):
    """Uvicorn's server, without its handling of signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class Running:
    """An application that is served at a socket.

    Args:
        listener: a bound socket.
        asked: numbers of signals to stop, which `stop` adds to.
    """

    def __init__(
        self, app: App, state: State, listener: socket.socket, limits: Limits, asked: "asyncio.Queue[int] | None" = None
    ) -> None:
        self._state = state
        self._listener, self._limits = listener, limits
        config = uvicorn.Config(
            cast(Any, app),
            loop="asyncio",
            http=cast("type[asyncio.Protocol]", partial(BoundedConnection, limits)),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive_s,
            timeout_graceful_shutdown=_LAST_S,
            h11_max_incomplete_event_size=limits.head_bytes - 1,  # what fills the room of a head and is none
        )
        self._server = _Server(config)
        self._asked: asyncio.Queue[int] = asyncio.Queue() if asked is None else asked

    @property
    def has_started(self) -> bool:
        """Whether requests are taken."""
        return self._server.started

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Let what runs finish, then end; asked twice, end at once. For the thread of the event loop."""
        self._asked.put_nowait(number)

    async def serve(self, ready: Callable[[], None], draining: Callable[[int], None]) -> int:
        """Serve until `stop`, or until the backend has no ranks; return the number of a second signal, else 0.

        Args:
            ready: called when requests are taken.
            draining: called with the number of answers that are still written, when `stop` is called.
        """
        serving = asyncio.create_task(self._server.serve([self._listener]))
        try:
            while not self._server.started and not serving.done():
                await asyncio.sleep(_POLL_S)
            ready()
            await self._first_of(self._asked.get(), self._state.gone.wait(), serving)
            self._state.is_draining = True
            draining(self._state.running)
            second = await self._finish()
            self._state.over.set()
            self._server.should_exit, self._server.force_exit = True, second != 0
            await serving
            return second
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _finish(self) -> int:
        """Wait until nothing runs, the time for it is up, or a second signal, whose number is returned."""
        try:
            async with asyncio.timeout(self._limits.drain_s):
                while self._state.running:
                    await asyncio.sleep(_POLL_S)
                    if not self._asked.empty():
                        return self._asked.get_nowait()
        except TimeoutError:
            pass
        return 0

    @staticmethod
    async def _first_of(*waits: Any) -> None:
        tasks = [asyncio.ensure_future(each) for each in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in tasks[:-1]:  # the last is the server itself
                each.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and not yet listening.

    Raises:
        OSError: the address is taken or not this machine's; a sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Connections of a socket whose protocol is said are sent at once (TCP_NODELAY, by asyncio); others wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"can't listen at {host} port {port}: {why}; choose another --port (0 takes a free one), or --host"
        ) from None
    return listener
