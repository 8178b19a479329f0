"""Ranks that continue texts for who talks to them: load the weights, and answer through a socket until it is closed."""

import selectors
import socket
import time
from pathlib import Path
from typing import Final

import torch

from trimaran.launchers.worker.tasks import ServeTask
from trimaran.models.transformer import Stage
from trimaran.runtime.evaluate.engine.budget import measured_budget
from trimaran.runtime.evaluate.engine.weights import load_stages
from trimaran.runtime.infer.batching.messages import Event, encode_event
from trimaran.runtime.infer.batching.orders import End, Order, Ready, decode_order, encode_ready
from trimaran.runtime.infer.batching.replica import Limits, serve
from trimaran.runtime.infer.packing import pack_weights
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec

_CHUNK: Final = 1 << 16
_CONNECT_S: Final = 30.0
_LAST_WORDS_S: Final = 5.0  # for a talker to read what is left


def run_serve(task: ServeTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Continue texts until the talker ends it or is gone; return the exit code. Collective over the world."""
    is_leader = mesh.pp.rank == 0 and mesh.tp.rank == 0
    desk = SocketDesk(task.socket) if is_leader else NoDesk()
    stages = load_stages(task.model, spec, mesh, device)
    pack_weights(stages, mesh)
    limits = Limits(task.slots, min(task.context or spec.transformer.max_seq_len, spec.transformer.max_seq_len))
    serve(stages, mesh, spec, _within_memory(limits, stages, mesh, spec), desk)
    if isinstance(desk, SocketDesk):
        desk.close()
    return 0


class NoDesk:
    """The desk of ranks that lead nobody."""

    def poll(self, timeout_s: float) -> list[Order]:
        """Return no orders."""
        return []

    def ready(self, ready: Ready) -> None:
        """Tell nobody."""

    def tell(self, events: list[Event]) -> None:
        """Tell nobody."""


class SocketDesk:
    """The leader's end of a Unix socket: orders come and events go as lines. Only `poll` waits.

    A talker that is gone counts as one that says End.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_CONNECT_S)
        self._socket.connect(str(path))
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._unread, self._unsent = b"", bytearray()
        self._is_gone = False

    def poll(self, timeout_s: float) -> list[Order]:
        """Return the orders that have come; waits for the first one up to that time, or until all events are sent."""
        deadline = time.monotonic() + timeout_s
        while not self._is_gone:
            self._send()
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            self._selector.modify(self._socket, events)
            found = self._selector.select(max(0.0, deadline - time.monotonic()))
            orders = self._read() if any(mask & selectors.EVENT_READ for _, mask in found) else []
            if orders or self._is_gone or time.monotonic() >= deadline:
                return [*orders, End()] if self._is_gone else orders
        return [End()]

    def ready(self, ready: Ready) -> None:
        """Send the first line."""
        self._put(encode_ready(ready))

    def tell(self, events: list[Event]) -> None:
        """Send events."""
        self._put(b"".join(map(encode_event, events)))

    def close(self) -> None:
        """Send what is left, for a short time, and close the connection."""
        deadline = time.monotonic() + _LAST_WORDS_S
        self._selector.modify(self._socket, selectors.EVENT_WRITE)
        while self._unsent and not self._is_gone and time.monotonic() < deadline:
            self._selector.select(deadline - time.monotonic())
            self._send()
        self._selector.close()
        self._socket.close()

    def _put(self, data: bytes) -> None:
        self._unsent += data
        self._send()

    def _send(self) -> None:
        while self._unsent and not self._is_gone:
            try:
                del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                return
            except OSError:
                self._is_gone = True

    def _read(self) -> list[Order]:
        parts = [self._unread]
        try:
            while True:
                data = self._socket.recv(_CHUNK)
                if not data:
                    self._is_gone = True
                    break
                parts.append(data)
        except BlockingIOError:
            pass
        except OSError:
            self._is_gone = True
        *lines, self._unread = b"".join(parts).split(b"\n")
        return [decode_order(line) for line in lines]


def _within_memory(limits: Limits, stages: dict[int, Stage], mesh: Mesh, spec: RunSpec) -> Limits:
    """Return the limits that the free memory has room for. Collective over the world.

    A GPU's is taken at once; a CPU's as texts grow, but hours later there must be some left too.
    """
    budget = measured_budget(stages, mesh, spec.transformer, bounds_cache=False)
    return fitting(limits, budget.cache_tokens)


def fitting(limits: Limits, cache_tokens: int) -> Limits:
    """Return the limits whose texts have that many tokens at most: fewer slots, and a shorter context last."""
    context = min(limits.context, max(2, cache_tokens))
    return Limits(max(1, min(limits.slots, cache_tokens // context)), context, limits.pieces)
