"""The tether: a connection from every rank to rank 0 that carries the word of a failure to all of them, whatever launcher started them. No torch.

A rank that dies closes its connection, which its host's kernel does even for a process that was killed; a host that is
lost stops answering TCP's keepalive. Either way rank 0 learns of it within seconds, tells it, and passes it on, and
every rank ends: without this, ranks that wait in a collective notice the loss of a peer only when the collective's time
is up.
"""

import hmac
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field

_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 3, 1, 4  # 7 s for a host that is gone
_CONNECT_S = 10.0
_TOLD_S = 3.0  # for rank 0 to have passed a failure on, before the failing rank exits and its launcher ends the others
_POLL_S = 0.1
_SILENT = "it was killed (out of memory, perhaps), or its host is lost: it left no message"
SILENT_EXIT_CODE = 137
"""What ranks exit with when one died without a word: 128 + SIGKILL, after which no process can leave one."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Failure:
    """Why a rank ended before its time.

    Args:
        rank: the one that failed, and `where` it stands: host and coordinates.
        step: the training step that it was in; None before the first.
        exit_code: what it exits with, and every other rank with it.
        message: a sentence; `details` names a file with more, "" where there is none.
        seconds: since the epoch.
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


End = Callable[[Failure], None]
"""What a rank does when another has failed; runs in the tether's thread and does not return."""


class Tether:
    """This rank's end. Make it by `hold` on rank 0 and by `join` on the others; `fail` or `leave` ends it."""

    def __init__(self, peer: "_Hub | _Spoke") -> None:
        self._peer = peer

    @staticmethod
    def hold(listener: socket.socket, key: str, where: list[str], end: End, step: Callable[[], int | None]) -> "Tether":
        """Serve the tether on rank 0.

        Args:
            listener: a listening socket; it is closed at the end.
            key: a secret that the others show, so that no stranger can end a run.
            where: of every rank, by rank, for the message about one that dies without a word.
            end: called when a rank has failed.
            step: this rank's training step at the moment.
        """
        return Tether(_Hub(listener, key, where, end, step))

    @staticmethod
    def join(address: str, port: int, key: str, rank: int, end: End, hub: str) -> "Tether":
        """Connect to rank 0.

        Args:
            hub: where rank 0 stands.

        Raises:
            OSError: it does not answer.
        """
        return Tether(_Spoke(socket.create_connection((address, port), timeout=_CONNECT_S), key, rank, end, hub))

    def fail(self, failure: Failure) -> None:
        """Tell all ranks of this rank's failure; returns when rank 0 has passed it on, or after seconds."""
        self._peer.fail(failure)

    def leave(self) -> None:
        """End this rank's tether in good order: its end is no failure from here on."""
        self._peer.leave()


class _Spoke:
    """A rank's connection to rank 0, and the thread that waits for word from there."""

    def __init__(self, connection: socket.socket, key: str, rank: int, end: End, hub: str) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._connection, self._end, self._hub = connection, end, hub
        self._leaving, self._told = threading.Event(), threading.Event()
        _send(connection, {"key": key, "rank": rank})
        threading.Thread(target=self._listen, name="tether", daemon=True).start()

    def _listen(self) -> None:
        with self._connection, self._connection.makefile("rb") as reader, suppress(OSError, ValueError):
            while line := reader.readline(_LONGEST_LINE):
                word = json.loads(line)
                if "failed" in word:
                    self._fall(Failure(**word["failed"]))
                elif "told" in word:
                    self._told.set()
                elif "done" in word:
                    self._leaving.set()
        self._told.set()
        self._fall(Failure(0, self._hub, None, _SILENT, SILENT_EXIT_CODE))

    def _fall(self, failure: Failure) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            self._end(failure)

    def fail(self, failure: Failure) -> None:
        self._leaving.set()
        with suppress(OSError):
            _send(self._connection, {"failed": asdict(failure)})
            self._told.wait(_TOLD_S)

    def leave(self) -> None:
        self._leaving.set()
        with suppress(OSError):
            _send(self._connection, {"bye": True})
            self._connection.shutdown(socket.SHUT_WR)


class _Hub:
    """Rank 0's end: one thread that reads what the ranks send and notices who is gone."""

    def __init__(
        self, listener: socket.socket, key: str, where: list[str], end: End, step: Callable[[], int | None]
    ) -> None:
        self._listener, self._key, self._where, self._end, self._step = listener, key, where, end, step
        self._ranks: dict[socket.socket, int] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._gone: set[int] = set()
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="tether", daemon=True).start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=_POLL_S):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._accept()
                else:
                    self._read(connection)
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
                self._take(connection, line)
        if (not data or len(rest) > _LONGEST_LINE) and connection in self._unread:
            self._forget(connection)

    def _take(self, connection: socket.socket, line: bytes) -> None:
        if connection not in self._ranks:
            rank = self._rank_of(line)
            if rank is None:
                self._drop(connection)
            else:
                self._ranks[connection] = rank
            return
        word = json.loads(line)
        if "bye" in word:
            self._gone.add(self._ranks[connection])
        elif "failed" in word:
            self._gone.add(self._ranks[connection])
            self._pass_on(Failure(**word["failed"]), teller=connection)

    def _rank_of(self, line: bytes) -> int | None:
        """The rank that a first line names; None if some other program sent it, or a rank of another run."""
        try:
            word = json.loads(line)
        except ValueError:
            return None
        known = isinstance(word, dict) and hmac.compare_digest(str(word.get("key", "")).encode(), self._key.encode())
        return int(word["rank"]) if known else None

    def _forget(self, connection: socket.socket) -> None:
        """A connection has closed: in good order, or because its rank is no more."""
        rank = self._ranks.get(connection)
        self._drop(connection)
        if rank is not None and rank not in self._gone:
            self._gone.add(rank)
            self._pass_on(Failure(rank, self._where[rank], self._step(), _SILENT, SILENT_EXIT_CODE))

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._ranks.pop(connection, None)
        del self._unread[connection]
        connection.close()

    def _pass_on(self, failure: Failure, teller: socket.socket | None = None) -> None:
        if self._close({"failed": asdict(failure)}, teller):
            self._end(failure)

    def fail(self, failure: Failure) -> None:
        self._close({"failed": asdict(failure)})

    def leave(self) -> None:
        self._close({"done": True})

    def _close(self, word: dict[str, object], teller: socket.socket | None = None) -> bool:
        """Say a last word to every rank, once; whether this was the first call."""
        with self._lock:
            if self._closing.is_set():
                return False
            for connection in list(self._ranks):
                with suppress(OSError):
                    _send(connection, {"told": True} if connection is teller else word)
            self._closing.set()  # last: then the thread closes the connections
        return True


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out that the other host is gone, though neither side has anything to say."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, word: dict[str, object]) -> None:
    connection.sendall(json.dumps(word).encode() + b"\n")
