"""The failure relay: a failure, or a death without a message, reaches every rank at once.

A rank that closes its side, or a stranger that connects, ends nobody.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

import pytest

from tests.launchers.test_nccl_messages import wait_until
from trimaran.launchers.worker import failure_relay
from trimaran.launchers.worker.failure_relay import THREAD_NAME, Failure, FailureRelay
from trimaran.runtime.processes import this_machine

KEY = "a secret"
PLACES = [f"host h{rank}" for rank in range(4)]
SOON_S = 100.0  # at once, unless others want the cores


class World:
    """Rank 0 and three other ranks in this process; each has a queue of the failures that reach it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.told: list[queue.Queue[Failure]] = [queue.Queue() for _ in PLACES]
        self.ranks = [FailureRelay.serve(self.listener, KEY, PLACES, self.told[0].put, lambda: 12)]
        self.ranks += [
            FailureRelay.connect("127.0.0.1", self.port, KEY, rank, self.told[rank].put, PLACES[0])
            for rank in range(1, 4)
        ]
        wait_until(lambda: len(self.server._ranks) == 3)  # rank 0 has read who they are

    @property
    def server(self) -> Any:
        return self.ranks[0]._side

    def heard(self, rank: int) -> Failure:
        return self.told[rank].get(timeout=SOON_S)

    def silent(self, *ranks: int) -> bool:
        time.sleep(0.3)
        return all(self.told[rank].empty() for rank in ranks)

    def connection(self, rank: int) -> socket.socket:
        connection = self.ranks[rank]._side._connection  # type: ignore[union-attr]
        return connection


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for rank in (1, 2, 3, 0):
        world.ranks[rank].close()
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(SOON_S)
            assert not thread.is_alive(), "the relay's threads and sockets end with it"


def test_a_failure_reaches_every_other_rank_with_its_exit_code(world: World) -> None:
    failure = Failure(2, PLACES[2], 7, "the loss is not a number", exit_code=5)
    world.ranks[2].send(failure)
    relayed: threading.Event = world.ranks[2]._side._relayed  # type: ignore[union-attr]
    assert relayed.is_set(), "the failing rank waits for rank 0 to have passed it on, and no longer"
    assert [world.heard(rank) for rank in (0, 1, 3)] == [failure] * 3
    assert world.silent(2)
    assert str(failure) == "rank 2 (host h2) failed at step 7: the loss is not a number"


def test_a_failure_of_rank_0_reaches_the_others(world: World) -> None:
    failure = Failure(0, PLACES[0], None, "no space left", details="traceback.txt")
    world.ranks[0].send(failure)
    assert [world.heard(rank) for rank in (1, 2, 3)] == [failure] * 3
    assert world.silent(0)
    assert str(failure) == "rank 0 (host h0) failed: no space left; where: traceback.txt"


def test_a_death_without_a_word_is_told_with_host_and_step(world: World) -> None:
    world.connection(3).shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    failure = world.heard(0)
    assert (failure.rank, failure.where, failure.step) == (3, "host h3", 12)
    assert "it was killed" in failure.message
    assert failure.exit_code == 137
    assert world.heard(1) == failure


def test_the_death_of_rank_0_is_noticed_by_all(world: World) -> None:
    world.ranks[0]._side._closing.set()  # type: ignore[union-attr] # its connections close without a last word
    assert [(failure.rank, failure.where) for failure in (world.heard(rank) for rank in (1, 2, 3))] == [
        (0, "host h0")
    ] * 3


def test_only_the_first_failure_is_passed_on(world: World) -> None:
    world.ranks[1].send(Failure(1, PLACES[1], 3, "first"))
    world.ranks[2].send(Failure(2, PLACES[2], 3, "second"))
    assert world.heard(3).message == "first"
    assert world.silent(3)


@pytest.mark.parametrize("order", [(1, 2, 3, 0), (0, 1, 2, 3), (2, 0, 3, 1)])
def test_leaving_in_good_order_is_no_failure(world: World, order: tuple[int, ...]) -> None:
    for rank in order:
        world.ranks[rank].close()
    assert world.silent(0, 1, 2, 3)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b'{"key": "another", "rank": 1}\n',
        b'{"failed": {}}\n',
        b"[]\n",
        b'{"key": 3}\n',
    ],
)
def test_a_stranger_ends_nobody(world: World, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", world.port)) as stranger:
        stranger.sendall(words)
        stranger.settimeout(SOON_S)
        with suppress(ConnectionResetError):
            assert stranger.recv(100) == b"", "it is hung up on"
    assert world.silent(0, 1, 2, 3)
    world.ranks[1].send(Failure(1, PLACES[1], 1, "still heard"))
    assert world.heard(2).message == "still heard"


def test_a_long_word_that_never_ends_is_not_kept(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.port)) as stranger:
        sent = 0
        with suppress(ConnectionResetError, BrokenPipeError):
            while sent < 10_000_000:
                sent += stranger.send(b"x" * 100_000)
                time.sleep(0.001)
    assert sent < 10_000_000
    assert world.silent(0, 1, 2, 3)


def test_words_may_come_in_pieces(world: World) -> None:
    word = json.dumps({"failed": {"rank": 1, "where": PLACES[1], "step": 2, "message": "in pieces"}}).encode() + b"\n"
    for index in range(0, len(word), 7):
        world.connection(1).sendall(word[index : index + 7])
        time.sleep(0.01)
    assert world.heard(0).message == "in pieces"


# --- a rank that is stopped


class Sleeper:
    """A process that stands for a rank which is stopped: its relay is connected and answers nothing."""

    def __init__(self, world: World, rank: int) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        os.kill(self.process.pid, signal.SIGSTOP)
        world.ranks[rank].close()
        self.connection = socket.create_connection(("127.0.0.1", world.port))
        hello = {"key": KEY, "rank": rank, "process": self.name}
        self.connection.sendall(json.dumps(hello).encode() + b"\n")
        wait_until(lambda: self.name in world.server._processes.values() and rank in world.server._ended)
        world.server._ended.discard(rank)

    @property
    def name(self) -> tuple[str, int]:
        return this_machine(), self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def has_been_killed(self) -> bool:
        self.connection.close()
        return self.process.wait(SOON_S) == -signal.SIGKILL


def waits_for(rank: int, other: int) -> Failure:
    return Failure(rank, PLACES[rank], 7, f"rank {rank} waits for rank {other}: no answer within the time-out")


@pytest.mark.parametrize("asking", [0, 1])
def test_after_a_time_out_the_stopped_rank_is_named_and_killed(world: World, asking: int) -> None:
    """Rank 1 waits for rank 2, which waits for rank 3."""
    with Sleeper(world, 3) as stopped:
        cause = world.ranks[asking].send(waits_for(asking, 2), timed_out=True)
        assert cause is not None
        assert (cause.rank, cause.where, cause.exit_code) == (3, "host h3", 137)
        assert "it was stopped (by SIGSTOP or a debugger)" in cause.message
        assert world.heard(2) == cause
        assert stopped.has_been_killed()


def test_after_a_time_out_among_living_ranks_its_own_message_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_relay, "_ROLL_CALL_S", 100.0)  # it is over when all have answered
    failure = waits_for(1, 2)
    assert world.ranks[1].send(failure, timed_out=True) is None
    assert world.heard(0) == failure
    assert world.heard(2) == failure


def test_a_failure_during_the_roll_call_is_the_cause(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_relay, "_ROLL_CALL_S", 100.0)  # it is not over before the reason is told
    reason = Failure(2, PLACES[2], 7, "no space left")
    answer: list[Failure | None] = []
    asking = threading.Thread(target=lambda: answer.append(world.ranks[1].send(waits_for(1, 2), timed_out=True)))
    with Sleeper(world, 3):
        asking.start()
        wait_until(lambda: world.server._roll_call is not None)
        world.ranks[2].send(reason)
        asking.join(SOON_S)
        assert world.heard(0) == reason
    assert answer == [reason]


def test_rank_0_that_is_stopped_is_named_and_killed_by_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, subprocess.Popen(["sleep", "1000"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            told: queue.Queue[Failure] = queue.Queue()
            port, rank_0 = listener.getsockname()[1], (this_machine(), process.pid)
            rank = FailureRelay.connect("127.0.0.1", port, KEY, 1, told.put, PLACES[0], rank_0)
            cause = rank.send(waits_for(1, 0), timed_out=True)
            assert process.wait(SOON_S) == -signal.SIGKILL
        finally:
            process.kill()
    assert cause is not None
    assert (cause.rank, cause.where) == (0, PLACES[0])
    assert "it was stopped" in cause.message
    assert told.empty()
