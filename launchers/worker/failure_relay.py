"""The failure relay: a connection from every rank to rank 0, over which a failure of one rank reaches all. No torch.

It does not depend on the launcher. When a rank dies, its connection closes: the kernel of its host sees to that even if
the process was killed. When a host is lost, it stops answering TCP's keepalive. In both cases rank 0 notices within
seconds and reports it to every rank, and all of them exit. Without the relay, ranks that wait in a collective would
notice the loss of a peer only at the collective's time-out.

A process that is stopped (SIGSTOP) keeps its connections. The rank that waits for it, or for one that waits for it,
fails at the time-out and names its neighbour. So after a time-out rank 0 calls the roll: a rank whose relay does not
answer is the cause. Ranks of its host kill it, because a stopped process does not act on SIGTERM.
"""

import hmac
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from trimaran.launchers.env.exit_codes import SILENT_EXIT_CODE, exit_code_after
from trimaran.launchers.worker.nccl_messages import WatchdogEnd
from trimaran.runtime.processes import is_stopped, this_machine

_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 3, 1, 4  # 7 s for a host that is gone
_CONNECT_S = 10.0
_RELAYED_S = 3.0  # for rank 0 to relay a failure, before the failing rank exits and its launcher ends the others
_ROLL_CALL_S = 3.0  # for the relays of all ranks to answer
_POLL_S = 0.1
DIED_SILENTLY = (
    "it was killed (out of memory, perhaps), or its host is lost, or it aborted and what it printed says why: it left "
    "no message"
)
_STOPPED = "it was stopped (by SIGSTOP or a debugger) longer than the others could wait, and is killed"
_ABSENT = "it does not answer: it is stopped, or hangs in a call that does not return; it is killed"
_SUSPECT_S = 9.0  # for the failure to show of which a rank's end is the consequence: longer than the keepalive's probes
_ABORTED = exit_code_after(signal.SIGABRT)
_LONGEST_LINE = 1 << 20
THREAD_NAME = "failure-relay"
"""Name of the relay's thread in every rank."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended before its time.

    Args:
        rank: the one that failed; `where` is its host and coordinates.
        step: its training step at that moment; None before the first.
        exit_code: of that rank, and of every other rank too.
        message: a sentence; `details` names a file with more, "" where there is none.
        seconds: the time, since the epoch.
    """

    rank: int
    where: str
    step: int | None
    message: str
    exit_code: int = 1
    details: str = ""
    seconds: float = field(default_factory=time.time)

    def __str__(self) -> str:
        step = "" if self.step is None else f" at step {self.step}"
        details = f"; where: {self.details}" if self.details else ""
        return f"rank {self.rank} ({self.where}) failed{step}: {self.message}{details}"


Process = tuple[str, int]
"""`this_machine` of a process, and its number there."""


def _no_last_words(rank: int) -> None:
    return None


LastWords = Callable[[int], WatchdogEnd | None]
"""Why a rank ended that has left no message, as far as its output tells."""
OnFailure = Callable[[Failure], None]
"""What a rank does when another has failed; runs in the relay's thread and does not return."""


class FailureRelay:
    """This rank's side of the relay: `serve` makes it on rank 0, `connect` on the others; `send` or `close` ends it."""

    def __init__(self, side: "_Server | _Client") -> None:
        self._side = side

    @staticmethod
    def serve(
        listener: socket.socket,
        key: str,
        where: list[str],
        on_failure: OnFailure,
        step: Callable[[], int | None],
        last_words: LastWords = _no_last_words,
    ) -> "FailureRelay":
        """Serve the relay on rank 0.

        Args:
            listener: a listening socket; the relay closes it.
            key: a secret that every rank sends first, so that no other program can end a run.
            where: host and coordinates of every rank, for the message about one that dies without a message.
            on_failure: called when another rank has failed.
            step: returns this rank's training step.
            last_words: asked about a rank that dies without a message.
        """
        return FailureRelay(_Server(listener, key, where, on_failure, step, last_words))

    @staticmethod
    def connect(
        address: str,
        port: int,
        key: str,
        rank: int,
        on_failure: OnFailure,
        where_of_rank_0: str,
        rank_0: Process = ("", 0),
        last_words: LastWords = _no_last_words,
    ) -> "FailureRelay":
        """Connect to rank 0, which is the process `rank_0`; `last_words` is asked if it dies without a message.

        Raises:
            OSError: it does not answer.
        """
        connection = socket.create_connection((address, port), timeout=_CONNECT_S)
        return FailureRelay(_Client(connection, key, rank, on_failure, where_of_rank_0, rank_0, last_words))

    def send(self, failure: Failure, *, timed_out: bool = False) -> Failure | None:
        """Send this rank's failure to all ranks; returns when rank 0 has relayed it, or after seconds.

        Args:
            timed_out: whether it is that another rank has not answered in time.

        Returns:
            After a time-out the failure of the rank that answers nobody, None where all ranks answer.
        """
        return self._side.send(failure, timed_out)

    def close(self) -> None:
        """Close this rank's side: from here on the end of this process is no failure."""
        self._side.close()


class _Client:
    """A rank's connection to rank 0, and the thread that reads from it."""

    def __init__(
        self,
        connection: socket.socket,
        key: str,
        rank: int,
        on_failure: OnFailure,
        where_of_rank_0: str,
        rank_0: Process,
        last_words: LastWords,
    ) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._connection, self._on_failure, self._where_of_rank_0 = connection, on_failure, where_of_rank_0
        self._rank_0, self._last_words = rank_0, last_words
        self._closing, self._relayed = threading.Event(), threading.Event()
        self._cause: Failure | None = None
        _write(connection, {"key": key, "rank": rank, "process": this_process()})
        threading.Thread(target=self._listen, name=THREAD_NAME, daemon=True).start()

    def _listen(self) -> None:
        with self._connection, self._connection.makefile("rb") as reader, suppress(OSError, ValueError):
            while line := reader.readline(_LONGEST_LINE):
                message = json.loads(line)
                if "failed" in message:
                    self._cause = Failure(**message["failed"])
                    self._relayed.set()
                    _kill(message.get("kill", []))
                    self._report(self._cause)
                elif "call" in message:
                    _write(self._connection, {"here": True})
                elif "relayed" in message:
                    self._relayed.set()
                elif "done" in message:
                    self._closing.set()
        self._relayed.set()
        if not self._closing.is_set():
            self._report(_died(0, self._where_of_rank_0, None, self._last_words(0)))

    def _report(self, failure: Failure) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._on_failure(failure)

    def send(self, failure: Failure, timed_out: bool) -> Failure | None:
        self._closing.set()
        with suppress(OSError):
            _write(self._connection, {"failed": asdict(failure), "timed_out": timed_out})
            heard = self._relayed.wait(_RELAYED_S + (_ROLL_CALL_S if timed_out else 0.0))
            if timed_out and not heard:
                self._cause = Failure(
                    0, self._where_of_rank_0, failure.step, _why_silent(self._rank_0), SILENT_EXIT_CODE
                )
                _kill([self._rank_0])
        return self._cause if timed_out else None

    def close(self) -> None:
        self._closing.set()
        with suppress(OSError):
            _write(self._connection, {"closed": True})
            self._connection.shutdown(socket.SHUT_WR)


class _Server:
    """Rank 0's side: one thread that reads from all ranks and notices a connection that ends."""

    def __init__(
        self,
        listener: socket.socket,
        key: str,
        where: list[str],
        on_failure: OnFailure,
        step: Callable[[], int | None],
        last_words: LastWords,
    ) -> None:
        self._listener, self._key, self._where, self._step = listener, key, where, step
        self._on_failure, self._last_words = on_failure, last_words
        self._suspect: tuple[Failure, float] | None = None  # a consequence: after that time the roll is called
        self._ranks: dict[socket.socket, int] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._ended: set[int] = set()  # ranks that have failed or closed their side
        self._processes: dict[int, Process] = {}
        self._roll_call: _RollCall | None = None
        self._own: Failure | None = None  # a time-out of rank 0 itself
        self._cause: Failure | None = None  # what the roll call has found
        self._judged = threading.Event()
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True).start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=_POLL_S):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._accept()
                else:
                    self._read(connection)
            if self._suspect is not None and time.monotonic() > self._suspect[1] and self._roll_call is None:
                self._call_roll(self._suspect[0], None)
            if self._own is not None and self._roll_call is None:
                self._call_roll(self._own, None)
            self._end_roll_call()
        self._judged.set()
        for connection in (*self._unread, self._listener):
            connection.close()
        self._selector.close()

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            _keep_alive(connection)
            self._unread[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, rest = (self._unread[connection] + data).split(b"\n")
        self._unread[connection] = rest
        for line in lines:
            if connection in self._unread:  # not dropped for the line before
                self._handle(connection, line)
        if (not data or len(rest) > _LONGEST_LINE) and connection in self._unread:
            self._handle_end(connection)

    def _handle(self, connection: socket.socket, line: bytes) -> None:
        if connection not in self._ranks:
            rank = self._rank_of(line)
            if rank is None:
                self._drop(connection)
            else:
                self._ranks[connection] = rank
            return
        message = json.loads(line)
        if "closed" in message:
            self._ended.add(self._ranks[connection])
        elif "here" in message:
            self._answered(connection)
        elif "failed" in message:
            self._ended.add(self._ranks[connection])
            failure = Failure(**message["failed"])
            if not message.get("timed_out"):
                self._relay(failure, sender=connection)
            elif self._roll_call is None:
                self._call_roll(failure, connection)
            self._answered(connection)

    def _call_roll(self, failure: Failure, sender: socket.socket | None) -> None:
        """After a rank's time-out, ask the relays of all others for an answer; `sender` is None for rank 0."""
        asked = {each for each, rank in self._ranks.items() if each is not sender and rank not in self._ended}
        self._roll_call = _RollCall(failure, sender, asked, time.monotonic() + _ROLL_CALL_S)
        for connection in asked:
            with suppress(OSError):
                _write(connection, {"call": True})

    def _answered(self, connection: socket.socket) -> None:
        if self._roll_call is not None:
            self._roll_call.awaited.discard(connection)

    def _end_roll_call(self) -> None:
        """Relay the cause of a time-out once all ranks have answered, or have had the time to."""
        call = self._roll_call
        if call is None or (call.awaited and time.monotonic() < call.deadline):
            return
        silent = sorted(self._ranks[each] for each in call.awaited if each in self._ranks)
        if not silent:
            self._relay(call.failure, call.sender)
            return
        processes = [self._processes[rank] for rank in silent]
        why, first = _why_silent(processes[0]), silent[0]
        self._cause = Failure(first, self._where[first], self._step(), why, SILENT_EXIT_CODE)
        _kill(processes)
        if self._finish({"failed": asdict(self._cause), "kill": processes}) and self._own is None:
            self._on_failure(self._cause)

    def _rank_of(self, line: bytes) -> int | None:
        """Return the rank that a first line names; None if another program sent the line, or a rank of another run."""
        try:
            message = json.loads(line)
        except ValueError:
            return None
        if not isinstance(message, dict):
            return None
        if not hmac.compare_digest(str(message.get("key", "")).encode(), self._key.encode()):
            return None
        rank, (machine, pid) = int(message["rank"]), message.get("process", ("", 0))
        self._processes[rank] = str(machine), int(pid)
        return rank

    def _handle_end(self, connection: socket.socket) -> None:
        """Drop a connection that has ended, and relay the death of its rank unless that rank has closed its side."""
        rank = self._ranks.get(connection)
        self._drop(connection)
        if rank is not None and rank not in self._ended:
            self._ended.add(rank)
            words = self._last_words(rank)
            failure = _died(rank, self._where[rank], self._step(), words)
            if words is None or not words.is_consequence:
                self._relay(failure)
            elif self._suspect is None:
                self._suspect = failure, time.monotonic() + _SUSPECT_S

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._answered(connection)
        self._ranks.pop(connection, None)
        del self._unread[connection]
        connection.close()

    def _relay(self, failure: Failure, sender: socket.socket | None = None) -> None:
        if self._finish({"failed": asdict(failure)}, sender) and failure is not self._own:
            self._on_failure(failure)

    def send(self, failure: Failure, timed_out: bool) -> Failure | None:
        if timed_out and not self._closing.is_set():
            self._own = failure
            self._judged.wait(_ROLL_CALL_S + _RELAYED_S)
        self._finish({"failed": asdict(failure)})
        return self._cause

    def close(self) -> None:
        self._finish({"done": True})

    def _finish(self, message: dict[str, object], sender: socket.socket | None = None) -> bool:
        """Send the last message to every rank, and only `relayed` to its sender; return whether this is the first call.

        Later calls do nothing.
        """
        with self._lock:
            if self._closing.is_set():
                return False
            for connection in list(self._ranks):
                with suppress(OSError):
                    _write(connection, {"relayed": True} if connection is sender else message)
            self._closing.set()  # last: the thread closes the connections after this
        return True


@dataclass
class _RollCall:
    """A question to all ranks after the time-out `failure` of `sender` (None: rank 0).

    awaited: the connections that have not answered.
    """

    failure: Failure
    sender: socket.socket | None
    awaited: set[socket.socket]
    deadline: float


def this_process() -> Process:
    """Return this process as others can kill it."""
    return this_machine(), os.getpid()


def _died(rank: int, where: str, step: int | None, words: WatchdogEnd | None) -> Failure:
    """Return the failure of a rank that has ended without a message, by its last words."""
    if words is None:
        return Failure(rank, where, step, DIED_SILENTLY, SILENT_EXIT_CODE)
    return Failure(rank, where, step, words.message, _ABORTED)


def _why_silent(process: Process) -> str:
    machine, pid = process
    return _STOPPED if machine and machine == this_machine() and is_stopped(pid) else _ABSENT


def _kill(processes: Sequence[Process]) -> None:
    """Kill those of the processes that are of this machine."""
    for machine, pid in processes:
        if machine and machine == this_machine() and pid != os.getpid():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out that the other host is gone, although neither side sends anything."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _write(connection: socket.socket, message: dict[str, object]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
