"""`trimaran serve` from its options to its end: the port is taken first, then the ranks start, then it is told."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from trimaran.launchers.env.exit_codes import LaunchError, Stopped
from trimaran.launchers.serve.app import ServeOptions, Service, serve_app
from trimaran.launchers.serve.http.server import Running
from trimaran.launchers.serve.http.state import State
from trimaran.launchers.serve.ranks import RankBackend
from trimaran.launchers.terminal import say
from trimaran.models.fields import counted
from trimaran.runtime.infer.batching.messages import BackendGoneError
from trimaran.runtime.infer.prompts import RunText

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_LEAVE_S = 5.0  # for ranks that have been told to end, when nobody wants to wait any more
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Serving:
    """What is served, and where.

    Args:
        listener: a bound socket.
    """

    text: RunText
    options: ServeOptions
    listener: socket.socket


async def serve_run(serving: Serving, start: Callable[[], Awaitable[RankBackend]]) -> None:
    """Serve a model until a signal, and let what runs finish.

    Args:
        start: starts the ranks.

    Raises:
        Stopped: a signal came before requests were taken, or a second one.
        LaunchError: the ranks have ended.
        ValueError: the model can't be served; a sentence.
    """
    asked: asyncio.Queue[int] = asyncio.Queue()
    with _stopping(asked):
        try:
            backend = await _unless_stopped(start(), asked)
        except BackendGoneError as error:
            raise LaunchError(str(error), 1) from None
        try:
            app = serve_app(backend, serving.text, serving.options)
            service: Service = app.state.service
            await _unless_stopped(service.warm_up(), asked)
            running = Running(app, service.state, serving.listener, serving.options.limits, asked)
            watch = asyncio.create_task(_tell_end(backend, service.state))
            try:
                second = await running.serve(lambda: _say_ready(serving, backend), _say_draining)
            finally:
                watch.cancel()
                service.close()
        finally:
            await _close(backend, asked)
        if second:
            raise Stopped(second)
        if service.state.gone_because:
            raise LaunchError(f"the model's ranks have ended: {service.state.gone_because}", 1)


async def _tell_end(backend: RankBackend, state: State) -> None:
    state.has_gone(str(await backend.ended()))


def _say_ready(serving: Serving, backend: RankBackend) -> None:
    host, port = serving.listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    say(
        f"{serving.options.name} is served at http://{address} (OpenAI's API: http://{address}/v1), "
        f"{counted(backend.slots, 'text')} at a time, of at most {backend.context:,} tokens each"
    )
    if serving.options.twin is not None:
        number = counted(len(serving.options.twin.library.index.passages), "passage")
        say(f"chats are answered from the {number} of its library (--no-retrieval for the weights alone)")
    if serving.text.template is None:
        say("the model has no chat template, so it continues texts only: /v1/completions")


def _say_draining(number: int) -> None:
    if number:
        say(f"no request is taken any more; {counted(number, 'answer')} still being written (again: end at once)")


async def _unless_stopped(work: Awaitable[_Result], asked: "asyncio.Queue[int]") -> _Result:
    """Return the result of some work; Stopped where a signal comes before, which ends the work."""
    task, stop = asyncio.ensure_future(work), asyncio.create_task(asked.get())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        raise Stopped(stop.result())
    finally:
        stop.cancel()
        task.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)


async def _close(backend: RankBackend, asked: "asyncio.Queue[int]") -> None:
    """End the ranks; after a signal they have `_LEAVE_S` to end, else Stopped."""
    closing = asyncio.ensure_future(backend.close())
    try:
        await _unless_stopped(asyncio.shield(closing), asked)
    except Stopped:
        _, still = await asyncio.wait({closing}, timeout=_LEAVE_S)
        if still:
            raise
        await closing


@contextmanager
def _stopping(asked: "asyncio.Queue[int]") -> Iterator[None]:
    """Put the numbers of signals to stop into a queue in the block. For the main thread."""
    loop = asyncio.get_running_loop()
    for number in _STOPPING:
        loop.add_signal_handler(number, asked.put_nowait, int(number))
    try:
        yield
    finally:
        for number in _STOPPING:
            loop.remove_signal_handler(number)
