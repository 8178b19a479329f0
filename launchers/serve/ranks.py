"""The ranks of a served model behind `Backend`: they run in processes of their own, at any layout. Imports no torch.

The leader of each dp replica connects to a Unix socket in a folder that only this user may enter. Requests go to the
replica with the fewest texts, or to one that has much of the prompt in its cache.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from trimaran.launchers.serve.wish import SOCKET, Wish, read_failure, write_wish
from trimaran.runtime.files import read_text
from trimaran.runtime.infer.batching.messages import (
    BackendGoneError,
    Event,
    Failed,
    Finished,
    NewToken,
    Request,
    decode_event,
)
from trimaran.runtime.infer.batching.orders import Cancel, End, Ready, decode_ready, encode_order
from trimaran.runtime.scratch import scratch_folder

_LONGEST_LINE: Final = 1 << 28  # bytes: the scores of a long prompt are one line
_LEAVE_S: Final = 20.0  # for ranks to leave by themselves
_TERMINATED_S: Final = 20.0  # for them to end after SIGTERM
_LONGEST_FOLDER: Final = 107 - len("/trimaran-serve-12345678/") - len(SOCKET)  # a socket's path has at most 107 bytes
_SHORT_FOLDERS: Final = ("/tmp", "/var/tmp", "/dev/shm")
_PREFERRED: Final = 32  # tokens of a prompt that a replica has, for which another's shorter row is passed over
_LAST_WORDS: Final = 400


class _Text:
    """A request and its events."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events: asyncio.Queue[Event | BackendGoneError] = asyncio.Queue()
        self.replica: _Replica | None = None
        self.tokens = list(request.prompt)


class _Replica:
    """A dp replica as its talker sees it.

    Attributes:
        texts: those that it continues, by request.
        known: the tokens of its latest texts, for the beginnings that it has in its cache.
    """

    def __init__(self, ready: Ready, writer: asyncio.StreamWriter) -> None:
        self.slots, self.context = ready.slots, ready.context
        self.writer = writer
        self.texts: dict[int, _Text] = {}
        self.known: deque[list[int]] = deque(maxlen=ready.slots)

    def has(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt it has, as far as is known here."""
        kept = (*self.known, *(each.tokens for each in self.texts.values()))
        return max((_common(prompt, each) for each in kept), default=0)


class RankBackend:
    """A model on its ranks; see messages.Backend. Made by `start`, used in that event loop alone."""

    def __init__(self, folder: Path, cleanup: contextlib.ExitStack) -> None:
        self.slots = self.context = 0
        self._folder, self._cleanup = folder, cleanup
        self._process: asyncio.subprocess.Process | None = None
        self._replicas: list[_Replica] = []
        self._waiting: deque[_Text] = deque()
        self._gone: BackendGoneError | None = None
        self._is_closing = False
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        model: Path,
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        slots: int = 8,
        context: int | None = None,
        logs: Path | None = None,
    ) -> "RankBackend":
        """Start tp * pp * dp ranks and return once they have the weights and have computed once.

        Args:
            model: a run's folder, a checkpoint, or the folder of a Hugging Face model.
            slots: texts that each dp replica continues at the same time; fewer where the memory has no room for as many
                of full length, and `slots` of the backend tells.
            context: most tokens of a prompt and its continuation; None for the model's.
            logs: where ranks keep their output; None for a folder that goes with them.

        Raises:
            ValueError: there is no such model, or it can't be cut like that.
            BackendGoneError: the ranks have failed.
        """
        if slots < 1:
            raise ValueError(f"slots ({slots}) must be at least 1")
        if context is not None and context < 2:
            raise ValueError(f"context ({context}) must be at least 2: a token of the prompt and one after it")
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(scratch_folder("serve", _short_folder()))
            paths = [None if each is None else str(each.resolve()) for each in (model, logs)]
            write_wish(folder, Wish(paths[0] or "", tp, pp, dp, slots, context, paths[1]))
            backend = cls(folder, stack.pop_all())
        try:
            await backend._meet(dp)
        except BaseException:
            await backend.close()
            raise
        return backend

    @property
    def active(self) -> int:
        """Texts that are being continued."""
        return sum(len(each.texts) for each in self._replicas)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        """Yield the events of a request; see messages.Backend."""
        if self._gone is not None:
            raise self._gone
        if self._is_closing:
            raise BackendGoneError("the model is being closed")
        text = _Text(request)
        self._waiting.append(text)
        try:
            self._assign()
            while True:
                event = await text.events.get()
                if isinstance(event, BackendGoneError):
                    raise event
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            await self._drop(text)

    async def ended(self) -> BackendGoneError:
        """Wait until the ranks have ended; return why."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._gone is not None)
        assert self._gone is not None
        return self._gone

    async def close(self, drain_s: float = 0.0) -> None:
        """Let what runs go on for at most that many seconds, then end the ranks. May be called again."""
        self._is_closing = True
        if drain_s > 0 and self._gone is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s), self._changed:
                    await self._changed.wait_for(lambda: not (self.active or self._waiting) or self._gone is not None)
        self._end_texts(BackendGoneError("the model is being closed"))
        for replica in self._replicas:
            with contextlib.suppress(OSError):
                replica.writer.write(encode_order(End()))
        if self._process is not None:
            await _end_process(self._process, is_told=bool(self._replicas))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self._replicas:
            replica.writer.close()
        self._cleanup.close()

    async def _meet(self, dp: int) -> None:
        """Start the process, and wait for the first line of every replica's leader."""
        server = await asyncio.start_unix_server(self._serve, str(self._folder / SOCKET), limit=_LONGEST_LINE)
        try:
            self._process = await _start_process(self._folder)
            self._keep(asyncio.create_task(self._watch(self._process)))
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._replicas) == dp or self._gone is not None)
        finally:
            server.close()
        if self._gone is not None:
            failure = read_failure(self._folder)
            raise ValueError(failure.message) if failure is not None and failure.is_wrong_value else self._gone
        self.slots = sum(each.slots for each in self._replicas)
        self.context = min(each.context for each in self._replicas)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Follow the leader of a replica until its connection ends."""
        task = asyncio.current_task()
        assert task is not None
        self._keep(task)
        try:
            line = await reader.readline()
            if not line:
                return
            replica = _Replica(decode_ready(line), writer)
            self._replicas.append(replica)
            await self._tell_changed()
            while line := await reader.readline():
                self._take(replica, decode_event(line))
        except OSError:
            return

    def _take(self, replica: _Replica, event: Event) -> None:
        text = replica.texts.get(event.request)
        if text is None:  # cancelled meanwhile
            return
        if isinstance(event, NewToken):
            text.tokens.append(event.token)
        text.events.put_nowait(event)
        if isinstance(event, Finished | Failed):
            self._leave(text)
            self._assign()

    def _assign(self) -> None:
        """Send waiting requests to replicas that have a free slot."""
        while self._waiting and self._gone is None:
            free = [each for each in self._replicas if len(each.texts) < each.slots]
            if not free:
                return
            text = self._waiting.popleft()
            replica = min(free, key=lambda each: len(each.texts))
            if len(self._replicas) > 1:
                best = max(free, key=lambda each: each.has(text.request.prompt))
                replica = best if best.has(text.request.prompt) >= _PREFERRED else replica
            replica.texts[text.request.id], text.replica = text, replica
            replica.writer.write(encode_order(text.request))

    def _leave(self, text: _Text) -> None:
        """Free the place of a text."""
        replica, text.replica = text.replica, None
        if replica is not None:
            del replica.texts[text.request.id]
            replica.known.append(text.tokens)

    async def _drop(self, text: _Text) -> None:
        """Cancel a text whose events nobody reads any more; does nothing for one that has ended."""
        if text in self._waiting:
            self._waiting.remove(text)
        replica = text.replica
        if replica is not None:
            self._leave(text)
            if self._gone is None:
                replica.writer.write(encode_order(Cancel(text.request.id)))
                self._assign()
        await self._tell_changed()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Tell everybody when the process has ended."""
        code = await process.wait()
        self._gone = BackendGoneError(self._why(code))
        self._end_texts(self._gone)
        await self._tell_changed()

    def _why(self, code: int) -> str:
        failure = read_failure(self._folder)
        if failure is not None:
            return failure.message
        if self._is_closing:
            return "the model is closed"
        how = f"were killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lines = [line for line in _output(self._folder).splitlines() if line.strip()]
        return f"the model's ranks {how}" + (f": {lines[-1][:_LAST_WORDS]}" if lines else "")

    def _end_texts(self, error: BackendGoneError) -> None:
        texts = [*self._waiting, *(text for replica in self._replicas for text in replica.texts.values())]
        for text in texts:
            text.events.put_nowait(error)

    async def _tell_changed(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _start_process(folder: Path) -> asyncio.subprocess.Process:
    """Start the process of the ranks, in a session of its own: Ctrl-C is for the talker, which closes the backend."""
    command = [sys.executable, "-P", "-m", "trimaran.launchers.serve.start", str(folder)]
    with (folder / "output.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


async def _end_process(process: asyncio.subprocess.Process, *, is_told: bool) -> None:
    """Wait for the end of the process, for a time, and then see to it.

    Args:
        is_told: whether its ranks have been told to leave.
    """
    steps = ((None, _LEAVE_S if is_told else 0.0), (signal.SIGTERM, _TERMINATED_S), (signal.SIGKILL, None))
    for number, wait_s in steps:
        if process.returncode is None:
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), wait_s)


def _output(folder: Path) -> str:
    try:
        return read_text(folder / "output.log", errors="replace")
    except OSError:
        return ""


def _short_folder() -> Path | None:
    """Return where the socket's folder is made; None for the folder of temporary files, if its path is short enough."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER:
        return None
    short = (each for each in _SHORT_FOLDERS if os.access(each, os.W_OK | os.X_OK))
    found = next(short, None)
    if found is None:
        raise ValueError(
            f"TMPDIR {tempfile.gettempdir()} is too long for a socket, and {', '.join(_SHORT_FOLDERS)} can't be "
            "written; set TMPDIR to a shorter folder"
        )
    return Path(found)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first items are the same."""
    return next(
        (index for index, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
    )
