"""Starting the workers that prepare data, by the launcher that a run has: here, by srun or by mpirun."""

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.launchers.env.commands import find_mpirun
from trimaran.launchers.env.network import LOOPBACK, check_loopback
from trimaran.runtime.data.engine.cluster import StartWorkers, Workers
from trimaran.runtime.data.files import DataError
from trimaran.runtime.processes import usable_cores
from trimaran.runtime.spec import RunSpec

MOST_STARTS: Final = 20
"""Of one command, until no more workers are started by it."""
_POLL_S = 0.2
_GOODBYE_S = 10.0
_GRACE_S = 15.0


@dataclass(frozen=True)
class WorkerOptions:
    """How many workers, and what each may take.

    Attributes:
        timeout_s: the most seconds of one document.
        memory_bytes: the most memory of a worker; None for no limit.
    """

    count: int
    timeout_s: float
    memory_bytes: int | None

    @staticmethod
    def of_spec(spec: RunSpec, count: int | None = None) -> "WorkerOptions":
        """Return what a spec says; `count` is in place of its own."""
        data = spec.data
        memory = None if data.worker_memory is None else int(data.worker_memory * (1 << 30))
        return WorkerOptions(count or data.workers or usable_cores(), data.task_timeout_s, memory)

    def command(self, credentials: Path) -> list[str]:
        """Return the command of one worker's supervisor."""
        memory = [] if self.memory_bytes is None else ["--memory-bytes", str(self.memory_bytes)]
        module = [sys.executable, "-P", "-m", "trimaran.launchers.data", str(credentials)]
        return [*module, "--timeout-s", f"{self.timeout_s:g}", *memory]


def local_workers(options: WorkerOptions) -> Workers:
    """Return workers that are processes of this machine; nothing is open to the network.

    Raises:
        AddressError: they could not be reached.
    """
    check_loopback()
    return Workers(options.count, LOOPBACK, _starter([], options.count, options, ["--parent", str(os.getpid())]))


def mpi_workers(options: WorkerOptions, host: str) -> Workers:
    """Return workers that mpirun starts, on the hosts that it knows.

    Raises:
        ValueError: there is no mpirun.
    """
    return Workers(options.count, host, _starter([find_mpirun(), "-n", str(options.count)], 1, options))


def slurm_workers(options: WorkerOptions, host: str, spec: RunSpec, *, in_job: bool) -> Workers:
    """Return workers that srun starts, on the nodes of this job, or of one that it asks for.

    Args:
        host: address of this machine at which the nodes reach it.
        spec: what the slurm section says of a job is asked for.
        in_job: whether this process runs in a job.
    """
    asked = [] if in_job else [f"--{name}={value}" for name, value in spec.slurm.place.items()]
    srun = ["srun", "--mpi=none", "--kill-on-bad-exit=0", f"--ntasks={options.count}", "--cpus-per-task=1", *asked]
    srun += [] if in_job else ["--job-name=trimaran-prepare"]
    return Workers(options.count, host, _starter(srun, 1, options))


def _starter(prefix: Sequence[str], copies: int, options: WorkerOptions, more: Sequence[str] = ()) -> StartWorkers:
    @contextmanager
    def start(credentials: Path) -> Iterator[_Crew]:
        crew = _Crew([*prefix, *options.command(credentials), *more], copies)
        try:
            yield crew
        finally:
            crew.end()

    return start


class _Crew:
    """Copies of one command that are kept running."""

    def __init__(self, command: Sequence[str], copies: int) -> None:
        self._command = command
        self._keepers = [_Keeper(command) for _ in range(copies)]

    def check(self) -> None:
        """Raise DataError where no worker is left and none will come."""
        if not any(keeper.is_alive() for keeper in self._keepers):
            raise DataError(
                f"no worker is left: each has ended {MOST_STARTS} times ({shlex.join(self._command)}); what they "
                "printed says why"
            )

    def expect_end(self) -> None:
        """Start none anew from now on; those that run get a while to end by themselves."""
        for keeper in self._keepers:
            keeper.stop(_GOODBYE_S)

    def end(self) -> None:
        """End all and wait for that."""
        for keeper in self._keepers:
            keeper.stop(0.0)
        for keeper in self._keepers:
            keeper.join()


class _Keeper:
    """Keeps a command running: starts it again where it ends, as where somebody has killed it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command, self._stopping, self._patience_s = command, threading.Event(), 0.0
        # The kernel ends a command with the thread that started it, so the thread stays as long as the command.
        self._thread = threading.Thread(target=self._keep, name="workers", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        for _ in range(MOST_STARTS):
            try:
                process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
            except OSError as error:
                print(f"cannot start a worker: {error}", file=sys.stderr)
                return
            while process.poll() is None and not self._stopping.is_set():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            if self._stopping.is_set():
                _end(process, self._patience_s)
                return

    def is_alive(self) -> bool:
        """Return whether the command runs or is started again."""
        return self._thread.is_alive()

    def stop(self, patience_s: float) -> None:
        """Have it end, and be ended where it takes longer than that; a second call changes nothing."""
        if not self._stopping.is_set():
            self._patience_s = patience_s
            self._stopping.set()

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()


def _end(process: "subprocess.Popen[bytes]", patience_s: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
