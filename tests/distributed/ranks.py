"""A pool of rank processes for tests: started once, reused by every test, each run inside a fresh gloo group.

A test takes the session fixture `ranks` and calls ``ranks.run(function, world_size, *args)`` with a function of its own
module; the function sees an initialised default group of exactly that size and may use all of `torch.distributed`.
Importing torch and trimaran costs seconds of CPU, so the session's fork server does it once; a fork of it, the nursery,
forks the ranks, and these stay from test to test; everything in `torch.distributed` is made anew for each run. Ranks
are never forked from the test's own process: it has torch's threads.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from tests.distributed.rank_process import STACKS_SIGNAL
from tests.launchers.forked import Forked, fork_server
from tests.session import made_once

R = TypeVar("R")

MAX_RANKS = 8
START_TIMEOUT_S = 200.0  # one torch import takes 3 s, and a minute where many others want the same cores
GROUP_MARGIN_S = 60.0  # a rank's own wait ends after the pool's, which knows the stacks of all ranks
GRACE_S = 20.0  # after one rank failed, for its peers to notice
IDLE_TIMEOUT_S = 120.0  # for a rank to destroy its group
STACKS_TIMEOUT_S = 30.0  # for a signalled rank to write its stacks
OUTPUT_CHARACTERS = 4000  # of a rank's standard output and error, in an error message
PRELOADED = (
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch._dynamo",
    "pytest",
    "trimaran.runtime.data.samples.objectives",
    "trimaran.runtime.infer.generate",
    "trimaran.runtime.train.state",
    "trimaran.runtime.train.train_context",
)
"""What ranks import: the process that the nursery is forked from does it for all of them."""
NURSERY = """
import sys
sys.path.append(sys.argv[1])  # last, so that only `tests.` is found by it
from tests.distributed.rank_process import main
main(int(sys.argv[2]))
"""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankFailed(RuntimeError):
    """A rank raised, died or hung. The message starts with the rank that is the cause; `rank` is its number.

    If the cause is an exception that pickles, it is `__cause__`.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class RankDied(RankFailed):
    """A rank's process ended in the middle of a run."""


class RankHung(RankFailed):
    """A rank gave no answer in time; the message holds the stacks of every rank that was still running."""


@dataclass(frozen=True)
class RankProcess:
    """One rank's process and the ways to reach it. Its id is its own until the nursery has waited for it."""

    pid: int
    connection: Connection
    output: Path
    stacks: Path

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a process that is gone is noticed where its answer is read."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(pickle.dumps(message))


class Nursery:
    """The process that forks ranks; see rank_process.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forked = 0
        self._log = folder / "nursery"
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        # gloo asks the resolver for this host's name unless it is told an interface, and that name may not resolve.
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        fork_server()
        with theirs, self._log.open("wb") as log, Path(os.devnull).open() as nothing:
            descriptors = {0: nothing.fileno(), 1: log.fileno(), 2: log.fileno(), theirs.fileno(): theirs.fileno()}
            root = str(Path(__file__).parents[2])
            words = ["-c", NURSERY, root, str(theirs.fileno())]
            self._process = Forked(words, Path.cwd(), descriptors, environment, preload=PRELOADED)
        self._control.settimeout(START_TIMEOUT_S)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether the process runs; without it no rank does.

        It says nothing unasked, so that only its end can be read. The fork server tells of that a moment later.
        """
        return self._process.poll() is None and not select.select([self._control], [], [], 0)[0]

    def fork(self) -> RankProcess:
        """Return a new rank."""
        self._forked += 1
        output, stacks = self._folder / f"output-{self._forked}", self._folder / f"stacks-{self._forked}"
        output.touch()
        stacks.touch()
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            request = pickle.dumps({"do": "fork", "output": str(output), "stacks": str(stacks)})
            socket.send_fds(self._control, [request], [theirs.fileno()])
            return RankProcess(self._receive()["pid"], ours, output, stacks)

    def wait(self, rank: RankProcess) -> int:
        """Wait for the end of a rank that is ending; return its exit code, or minus the signal that killed it."""
        self._control.send(pickle.dumps({"do": "wait", "pid": rank.pid}))
        return int(self._receive()["code"])

    def close(self) -> None:
        """End the process; the kernel ends the ranks with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._control.recv(65536)
        except TimeoutError:
            raise RuntimeError(
                f"the process that forks ranks gave no answer in {START_TIMEOUT_S:.0f} s\n{self._log.read_text()}"
            ) from None
        if not message:
            raise RuntimeError(f"the process that forks ranks ended\n{self._log.read_text()}")
        return dict(pickle.loads(message))


@dataclass
class Run:
    """What is known of one call of `RankPool.run` while it goes on. Lists of outcomes are by rank."""

    name: str
    world_size: int
    timeout_s: float
    deadline: float  # on the monotonic clock; timeout_s counts from when every rank has entered
    output_starts: list[int]
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    died: dict[int, str] = field(default_factory=dict)

    def raised(self) -> dict[int, dict[str, Any]]:
        """Return the outcomes of the ranks that raised, the likely cause first.

        An error that only says that a peer left comes after the others; then the earliest is first, for a rank destroys
        its group, which is what its peers notice, only after its own exception was recorded.
        """
        raised = [(rank, outcome) for rank, outcome in self.outcomes.items() if outcome["status"] == "raised"]
        return dict(sorted(raised, key=lambda item: (item[1]["secondary"], item[1]["time"])))

    def leaves_ranks_fit(self) -> bool:
        """Return whether every process can take the next run: all answered, and none broke off making a group."""
        return len(self.idle) == self.world_size and all(outcome["fit"] for outcome in self.outcomes.values())

    def missing(self) -> list[int]:
        """Return the ranks that are still running the function."""
        return [rank for rank in range(self.world_size) if rank not in self.outcomes and rank not in self.died]


class RankPool:
    """Rank processes: started on demand, run functions of tests, and are replaced after a hang or a death."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="trimaran-ranks-"))
        self._nursery: Nursery | None = None
        self._ranks: list[RankProcess] = []
        self._runs = 0

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks that are up, in rank order."""
        return [rank.pid for rank in self._ranks]

    def run(self, function: Callable[..., R], world_size: int, *args: object, timeout_s: float = 120.0) -> list[R]:
        """Run ``function(*args)`` on ranks 0 to world_size - 1 in a fresh gloo group; return the results by rank.

        Before the function starts, torch has one thread, default dtype float32, gradients on and seed 0. The group's
        timeout is longer than `timeout_s`. The pool's processes keep the environment and the folder they started in.

        Args:
            function: a function at the top level of a module; arguments and results are pickled.
            world_size: 1 to 8 ranks.
            timeout_s: seconds, from when every rank is in the group, after which a run that is not over counts as hung.

        Raises:
            RankFailed: a function raised; the first traceback in the message is that of the rank that is the cause.
            RankDied: a process ended.
            RankHung: the time is over; the stacks of the ranks that are still running are in the message.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size ({world_size}) must be from 1 to {MAX_RANKS}")
        task = self._task(function, world_size, args, timeout_s)
        run: Run | None = None
        try:
            nursery = self._grow(world_size)
            starts = [rank.output.stat().st_size for rank in self._ranks[:world_size]]
            run = Run(task["qualname"], world_size, timeout_s, time.monotonic() + START_TIMEOUT_S, starts)
            for number, rank in enumerate(self._ranks[:world_size]):
                rank.send({**task, "rank": number})
            self._collect(run, nursery)
            self._settle(run)
        finally:
            # A test's own timeout or Ctrl-C in here leaves ranks in the middle of something, too.
            if run is None or not run.leaves_ranks_fit():
                self._kill_all()
            Path(task["store"]).unlink(missing_ok=True)
        return [pickle.loads(run.outcomes[rank]["payload"]) for rank in range(world_size)]

    def alone(self, function: Callable[..., R], *args: object) -> R:
        """Return what the function gives on one rank, which is made once a session for arguments of equal `repr`."""

        def made(_: str) -> R:
            return self.run(function, 1, *args)[0]

        return made_once(made, f"{function.__module__}.{function.__qualname__}{args!r}")

    def close(self) -> None:
        """End every process of the pool and remove its files."""
        self._close_nursery()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _task(
        self, function: Callable[..., Any], world_size: int, args: tuple[object, ...], timeout_s: float
    ) -> dict[str, Any]:
        module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if not module or not qualname or "<" in qualname:
            raise TypeError(
                f"{function!r} is not a function at the top level of a module, so a rank cannot load it by name"
            )
        self._runs += 1
        return {
            "module": module,
            "file": getattr(sys.modules.get(module), "__file__", None),
            "qualname": qualname,
            "arguments": pickle.dumps(args),
            "filters": portable_filters(),
            "world_size": world_size,
            "store": str(self._folder / f"store-{self._runs}"),
            "group_timeout_s": timeout_s + GROUP_MARGIN_S,
        }

    def _grow(self, world_size: int) -> Nursery:
        if self._nursery is not None and not self._nursery.is_up:
            self._close_nursery()
        if any(
            rank.connection.poll() for rank in self._ranks
        ):  # an idle rank says nothing: one was ended between two runs
            self._kill_all()
        if self._nursery is None:
            self._nursery = Nursery(self._folder)
        while len(self._ranks) < world_size:
            self._ranks.append(self._nursery.fork())
        return self._nursery

    def _collect(self, run: Run, nursery: Nursery) -> None:
        """Wait until every rank has an outcome and is idle, and no longer than that is likely to happen.

        Once one rank has failed its peers get a short grace: those that talk to it fail at once, and the others may
        never end.
        """
        while len(run.idle) < run.world_size:
            waiting = [rank for rank in range(run.world_size) if rank not in run.idle]
            ready = wait([self._ranks[rank].connection for rank in waiting], max(0.0, run.deadline - time.monotonic()))
            if not ready:
                return
            for rank in waiting:
                if self._ranks[rank].connection in ready:
                    self._read(run, rank, nursery)
            if run.died:
                return

    def _read(self, run: Run, rank: int, nursery: Nursery) -> None:
        """Read one message of a rank and answer it."""
        try:
            message = pickle.loads(self._ranks[rank].connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            run.died[rank] = describe_exit(nursery.wait(self._ranks[rank]))
            self._ranks[rank].connection.close()
            return
        if message["status"] == "idle":
            run.idle.add(rank)
            if message["problem"] is not None and run.outcomes[rank]["status"] == "returned":
                run.outcomes[rank] = message["problem"]
            return
        if message["status"] == "entered":
            run.entered.add(rank)
            if len(run.entered) == run.world_size:
                run.deadline = time.monotonic() + run.timeout_s
                for process in self._ranks[: run.world_size]:
                    process.send({"all": "entered"})
            return
        failed_before = bool(run.raised())
        run.outcomes[rank] = message
        release: Iterable[int] = ()
        if message["status"] == "raised" and not failed_before:
            # Those that have returned let go of their groups too, so that no peer waits for them in vain.
            run.deadline = min(run.deadline, time.monotonic() + GRACE_S)
            release = [other for other, outcome in run.outcomes.items() if outcome["status"] == "returned"]
        elif message["status"] == "returned" and failed_before:
            release = [rank]
        elif not failed_before and not run.missing():
            release = range(run.world_size)
            run.deadline = time.monotonic() + IDLE_TIMEOUT_S
        for other in release:
            self._ranks[other].send({"all": "answered"})

    def _settle(self, run: Run) -> None:
        """Raise if the run did not end well; the cause is told first, the rest after it."""
        raised = run.raised()
        # A rank that returned waits for the others, so while any is running it is not to blame.
        stuck = run.missing() or [
            rank for rank in range(run.world_size) if rank not in run.idle and rank not in run.died
        ]
        died_after = [rank for rank, outcome in raised.items() if run.died and not outcome["secondary"]]
        parts = [
            f"rank {rank} of {run.world_size} raised in {run.name}:\n{outcome['traceback']}"
            for rank, outcome in raised.items()
        ]
        if run.died:
            deaths = [f"rank {rank} of {run.world_size} {how} in {run.name}\n" for rank, how in run.died.items()]
            parts = parts + deaths if died_after else deaths + parts
        if not raised and not run.died and not stuck:
            return
        if stuck and not run.died:
            parts.append(self._describe_stuck(run, stuck))
        parts += [self._output(run, rank) for rank in range(run.world_size)]
        text = "\n".join(part for part in parts if part)
        if run.died:
            raise RankDied(text, died_after[0] if died_after else min(run.died))
        if not raised:
            raise RankHung(text, stuck[0])
        first = next(iter(raised))
        cause = raised[first]["payload"]
        raise RankFailed(text, first) from (pickle.loads(cause) if cause is not None else None)

    def _describe_stuck(self, run: Run, stuck: list[int]) -> str:
        """Return who is still running and who is not, with the stacks of the former."""
        for rank in stuck:
            os.kill(self._ranks[rank].pid, STACKS_SIGNAL)
        deadline, sizes, before = time.monotonic() + STACKS_TIMEOUT_S, [0], [-1]
        while time.monotonic() < deadline and not (
            all(sizes) and sizes == before
        ):  # a file that grows is being written
            time.sleep(0.2)
            before, sizes = sizes, [self._ranks[rank].stacks.stat().st_size for rank in stuck]
        lines = [f"{run.name} is not over on {len(stuck)} of {run.world_size} ranks"]
        for rank in range(run.world_size):
            if rank in stuck:
                where = "is still running" if rank not in run.outcomes else "cannot destroy its group"
                stacks = self._ranks[rank].stacks.read_text() or "no stack: the process answers no signal\n"
                lines.append(f"rank {rank} {where}:\n{stacks}")
            else:
                lines.append(f"rank {rank} {run.outcomes[rank]['status']}")
        return "\n".join(lines)

    def _output(self, run: Run, rank: int) -> str:
        """Return the end of what the rank printed during the run."""
        with self._ranks[rank].output.open("rb") as file:
            file.seek(run.output_starts[rank])
            text = file.read().decode(errors="replace")
        return f"output of rank {rank}:\n{text[-OUTPUT_CHARACTERS:]}" if text.strip() else ""

    def _kill_all(self) -> None:
        """End the ranks; the nursery stays, if it is up, and can fork new ones."""
        if self._nursery is None or not self._nursery.is_up:
            self._close_nursery()
            return
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            if not rank.connection.closed:  # its end was seen and waited for: the id may be another process by now
                rank.connection.close()
                os.kill(rank.pid, signal.SIGKILL)
                self._nursery.wait(rank)

    def _close_nursery(self) -> None:
        """End the nursery, and with it the ranks."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        for rank in self._ranks:
            rank.connection.close()
        self._ranks = []


@cache
def session_pool() -> RankPool:
    """Return the pool that all tests of this process share; it ends with the process."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def portable_filters() -> list[tuple[Any, ...]]:
    """Return this process's warning filters as arguments of `filterwarnings`, without pytest's own categories."""
    filters = []
    for action, message, category, module, lineno in warnings.filters:
        if isinstance(category, type) and category.__module__.split(".")[0] not in ("pytest", "_pytest"):
            patterns = [
                pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
                for pattern in (message, module)
            ]
            filters.append((action, patterns[0], category, patterns[1], lineno))
    return filters


def describe_exit(code: int) -> str:
    """Return in words how a process ended, from its `subprocess` return code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
