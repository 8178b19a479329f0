"""Messages that NCCL's users have met: what tells of a lost peer is no cause, and a watchdog's abort is told as one.

The messages are those of public reports, shortened; each has its address.
"""

import os
import queue
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Self, cast

import pytest

from trimaran.launchers.env.exit_codes import LaunchError
from trimaran.launchers.env.rank_env import node_name
from trimaran.launchers.local.launch import _why
from trimaran.launchers.worker import failure_relay
from trimaran.launchers.worker.failure_relay import Failure, FailureRelay
from trimaran.launchers.worker.nccl_messages import WatchdogEnd, tells_of_lost_peer, watchdog_end
from trimaran.launchers.worker.process import Rank
from trimaran.runtime.spec import RunSpec

# https://github.com/NVIDIA/nccl/issues/2076
RESET = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a \
network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgressOpt: Call to recv from 172.16.0.2<33759> failed : Connection reset by peer"""
# https://github.com/tatsu-lab/stanford_alpaca/issues/207
INFINIBAND = """NCCL error: remote process exited or there was a network error, NCCL version 2.14.3
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129"""
# https://github.com/pytorch/pytorch/pull/64241
ABORTED = (
    "NCCL communicator was aborted on rank 1. Original reason for failure was: Work: WorkNCCL(OpType=ALLREDUCE, "
    "TensorShape=[1], Timeout(ms)=2000) timed out in call to wait()."
)
# https://github.com/hiyouga/LlamaFactory/issues/2470
UNIQUE_ID = (
    "[15] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
    "but store->get('0') got error: Connection reset by peer. This may indicate a possible application crash on rank 0 "
    "or a network set up issue."
)
# https://github.com/zai-org/ChatGLM-6B/issues/1232
UNIQUE_ID_TIMEOUT = UNIQUE_ID.replace("Connection reset by peer", "Socket Timeout")
# https://github.com/pytorch/pytorch/pull/153586
STORE = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
# https://github.com/NVIDIA/nccl/issues/795
INTERNAL = """NCCL error in: ProcessGroupNCCL.cpp:1269, internal error, NCCL version 2.14.3
ncclInternalError: Internal check failed.
Last error:
Net : Connection closed by remote peer a100-st-p4d24xlarge-22.pcluster<47861>"""
LOST = (RESET, INFINIBAND, ABORTED, UNIQUE_ID, UNIQUE_ID_TIMEOUT, STORE, INTERNAL)
CAUSES = (
    "CUDA error: an illegal memory access was encountered",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    # https://github.com/NVIDIA/nccl/issues/1241
    """NCCL error in: ProcessGroupNCCL.cpp:1287, invalid usage, NCCL version 2.17.1
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3000""",
)

# https://github.com/huggingface/open-r1/issues/620, with the group's name as we give it
TIMED_OUT = """\
[rank3]:[E424 01:17:25.958 ProcessGroupNCCL.cpp:629] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(\
SeqNum=4, OpType=BROADCAST, NumelIn=112, NumelOut=112, Timeout(ms)=1800000) ran for 1800011 milliseconds before \
timing out.
[rank3]:[E424 01:17:25.958 ProcessGroupNCCL.cpp:695] [Rank 3] To avoid data inconsistency, we are taking the entire \
process down.
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 2 PG GUID 5(dp) Rank 3] Process group watchdog thread terminated with exception: [Rank 3] Watchdog \
caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST, NumelIn=112, NumelOut=112, \
Timeout(ms)=1800000) ran for 1800011 milliseconds before timing out.
Exception raised from checkTimeout at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:632 (most recent call \
first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f5a9616c1b6 in libc10.so)
"""
# https://github.com/hiyouga/LlamaFactory/issues/6849
LOST_BY_WATCHDOG = """\
[rank5]:[E207 19:37:09.983 ProcessGroupNCCL.cpp:1895] [PG ID 0 PG GUID 0(default_pg) Rank 5] Process group watchdog \
thread terminated with exception: NCCL error: remote process exited or there was a network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgressOpt: Call to recv from 10.119.24.53<49901> failed : Broken pipe
Exception raised from checkForNCCLErrorsInternal at ProcessGroupNCCL.cpp:2363 (most recent call first):
"""
# https://github.com/meta-llama/llama-cookbook/issues/567: torch 2.3 named no group
OLD_TIMED_OUT = """\
[rank1]:[E ProcessGroupNCCL.cpp:1414] [PG 0 Rank 1] Process group watchdog thread terminated with exception: [Rank 1] \
Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1474236, OpType=_ALLGATHER_BASE, NumelIn=262675456, \
NumelOut=1050701824, Timeout(ms)=600000) ran for 600096 milliseconds before timing out.
"""
# the watchdog is the first to see an error of the GPU: https://github.com/deepspeedai/DeepSpeed/issues/6896
ILLEGAL_ACCESS = """\
[rank7]:[E ProcessGroupNCCL.cpp:1414] [PG ID 0 PG GUID 0(default_pg) Rank 7] Process group watchdog thread terminated \
with exception: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
"""
# https://github.com/facebookresearch/dinov2/issues/447
HANGS = (
    "[rank0]:[F ProcessGroupNCCL.cpp:1169] [PG 0 Rank 0] ProcessGroupNCCL's watchdog got stuck for 600 seconds without "
    "making progress in monitoring enqueued collectives."
)


@pytest.mark.parametrize("message", LOST)
def test_a_lost_peer_is_known_as_a_consequence(message: str) -> None:
    assert tells_of_lost_peer(message)


@pytest.mark.parametrize("message", CAUSES)
def test_an_error_of_the_rank_itself_is_a_cause(message: str) -> None:
    assert not tells_of_lost_peer(message)


@pytest.mark.parametrize(
    ("output", "words", "is_consequence"),
    [
        (TIMED_OUT, "BROADCAST of its dp group did not end within 1800 s", True),
        (OLD_TIMED_OUT, "_ALLGATHER_BASE did not end within 600 s", True),
        (TIMED_OUT.partition("terminate called")[0], "BROADCAST did not end within 1800 s", True),
        (
            LOST_BY_WATCHDOG,
            "lost a peer or the network: socketProgressOpt: Call to recv from 10.119.24.53<49901>",
            True,
        ),
        (ILLEGAL_ACCESS, "ended it: CUDA error: an illegal memory access was encountered", False),
        (HANGS, "a call of CUDA or NCCL did not return in 600 s", False),
    ],
)
def test_a_watchdog_says_why_it_ended_a_rank(output: str, words: str, is_consequence: bool) -> None:
    end = watchdog_end("step 3/8  loss 2.1\n" + output)
    assert end is not None
    assert words in end.message
    assert end.is_consequence == is_consequence
    assert "\n" not in end.message


def test_output_without_a_watchdogs_end_says_nothing() -> None:
    assert watchdog_end("") is None
    assert watchdog_end("step 3/8\nTraceback (most recent call last):\nRuntimeError: " + RESET) is None


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Relayed:
    """A relay of rank 0 with two more ranks, one of which dies without a message."""

    def __init__(self, last_words: Callable[[int], WatchdogEnd | None]) -> None:
        self.told: queue.Queue[Failure] = queue.Queue()
        self.told_others: queue.Queue[Failure] = queue.Queue()
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        places = [f"host h{rank}" for rank in range(3)]
        self.server = FailureRelay.serve(listener, "key", places, self.told.put, lambda: 12, last_words)
        self.ranks = [
            FailureRelay.connect("127.0.0.1", port, "key", rank, self.told_others.put, places[0], last_words=last_words)
            for rank in (1, 2)
        ]
        wait_until(lambda: len(self.server._side._ranks) == 2)  # type: ignore[union-attr]

    def die(self, rank: int) -> None:
        self.ranks[rank - 1]._side._connection.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for relay in (*self.ranks, self.server):
            relay.close()


@pytest.mark.parametrize(("output", "exit_code"), [(ILLEGAL_ACCESS, 134), (None, 137)])
def test_a_death_is_told_by_what_the_watchdog_wrote(output: str | None, exit_code: int) -> None:
    with Relayed(lambda rank: watchdog_end(output) if output else None) as world:
        world.die(1)
        failure = world.told.get(timeout=60)
    assert (failure.rank, failure.step, failure.exit_code) == (1, 12, exit_code)
    assert ("killed (out of memory, perhaps)" in failure.message) == (output is None)


@pytest.mark.parametrize(("output", "exit_code"), [(TIMED_OUT, 134), (None, 137)])
def test_the_death_of_rank_0_is_told_by_what_the_watchdog_wrote(output: str | None, exit_code: int) -> None:
    with Relayed(lambda rank: watchdog_end(output) if output and rank == 0 else None) as world:
        world.server._side._closing.set()  # its connections close without a last word
        for _ in world.ranks:
            failure = world.told_others.get(timeout=60)
            assert (failure.rank, failure.where, failure.exit_code) == (0, "host h0", exit_code)
            assert ("BROADCAST of its dp group did not end within 1800 s" in failure.message) == (output is not None)


def test_a_consequence_waits_for_its_cause_and_is_told_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {1: watchdog_end(LOST_BY_WATCHDOG)}
    with Relayed(words.get) as world:
        world.die(1)
        wait_until(lambda: world.server._side._suspect is not None)  # type: ignore[union-attr]
        world.die(2)
        failure = world.told.get(timeout=60)
    assert (failure.rank, "was killed" in failure.message) == (2, True), "rank 1 has lost rank 2"

    monkeypatch.setattr(failure_relay, "_SUSPECT_S", 0.2)
    with Relayed(lambda rank: watchdog_end(TIMED_OUT)) as world:
        world.die(2)
        failure = world.told.get(timeout=60)
    assert (failure.rank, failure.exit_code) == (2, 134)
    assert "BROADCAST of its dp group" in failure.message


def test_a_rank_reads_what_another_wrote_to_its_standard_error(tmp_path: Path) -> None:
    rank = Rank(announces=False)
    assert rank.last_words_of(2) is None
    rank.keep_records(tmp_path)
    assert rank.last_words_of(2) is None
    (tmp_path / "rank-2").mkdir()
    (tmp_path / "rank-2" / "stderr.log").write_bytes(b"\xff" * 1000 + ILLEGAL_ACCESS.encode() + b"frame\n" * 10_000)
    end = rank.last_words_of(2)
    assert end is not None
    assert "illegal memory access" in end.message


def test_the_launcher_names_the_killed_rank_before_those_that_a_watchdog_aborted(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"rank-{number}").mkdir()
        (tmp_path / f"rank-{number}" / "stderr.log").write_text(LOST_BY_WATCHDOG)

    layout = cast(RunSpec, SimpleNamespace(axis_sizes={"pp": 2, "dp": 1, "cp": 1, "tp": 2}))

    def why(codes: dict[int, int]) -> LaunchError:
        error = _why({rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}, {}, layout, tmp_path)
        assert isinstance(error, LaunchError)
        return error

    aborted = -signal.SIGABRT
    here = node_name(os.environ)
    killed = why({1: aborted, 2: aborted, 3: -signal.SIGKILL})
    assert str(killed).startswith(f"rank 3 (host {here}, pp 1, dp 0, cp 0, tp 1) was killed by SIGKILL (out of")
    watchdog = why({1: aborted, 2: aborted, 3: -signal.SIGTERM})
    assert str(watchdog).startswith(
        f"rank 1 (host {here}, pp 0, dp 0, cp 0, tp 1) aborted (NCCL's watchdog ended it, for it has lost a peer or "
    )
    assert "out of memory" not in str(watchdog)
    assert watchdog.exit_code == 134
    first = why({0: aborted, 1: -signal.SIGTERM})
    assert ") was killed by SIGABRT (what it printed says why)" in str(first)
    assert str(first).endswith(f" and left no message; the output of the ranks is in {tmp_path}")
    (tmp_path / "rank-0").mkdir()
    (tmp_path / "rank-0" / "stderr.log").write_text(TIMED_OUT)
    told = why({0: aborted, 1: -signal.SIGTERM})
    assert str(told).startswith(
        f"rank 0 (host {here}, pp 0, dp 0, cp 0, tp 0) aborted (NCCL's watchdog ended it: BROADCAST of its dp group "
    )
