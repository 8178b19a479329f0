"""Start all ranks on this machine through torchrun's own API (torch.distributed.launcher): one agent, one worker process a rank."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.spec import RunSpec

STOPPED_EXIT_CODE = 128 + signal.SIGTERM
"""What every rank exits with when a signal stopped the run, so that it isn't taken for finished."""

_SHUTDOWN_S = 120  # for the ranks to save after a signal, before the agent kills them


class LaunchError(RuntimeError):
    """A rank failed; the message starts with the rank that is the cause. exit_code: that rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(RuntimeError):
    """A signal stopped the run and the ranks have left.

    Args:
        signal_number: which.
        problem: a sentence about what failed on the way out, "" for nothing.
        saved: a sentence about where the run can go on, "" where there is nothing to say.
    """

    def __init__(self, signal_number: int, problem: str = "", saved: str = "") -> None:
        text = f"stopped by {signal.Signals(signal_number).name}"
        super().__init__(text + (f", but {problem}" if problem else "") + (f"; {saved}" if saved else ""))
        self.signal_number = signal_number
        self.problem = problem


@dataclass(frozen=True)
class LocalRun:
    """How many ranks to start, the task file they read, and where their output goes. Rank 0 writes to this terminal."""

    spec: RunSpec
    task: Path
    log_folder: Path


@dataclass(frozen=True)
class _Failure:
    """How one rank ended, and the record that it left (`launchers/rank.py`), empty if it could not leave any."""

    rank: int
    exit_code: int
    record: Mapping[str, Any]

    @property
    def order(self) -> tuple[int, float]:
        """Sorts the cause first: an error, then a death without a word, then ranks that lost a peer, then those that the agent ended."""
        secondary = bool(self.record.get("secondary"))
        kind = 0 if self.record and not secondary else 2 if secondary else 3 if self.exit_code == -signal.SIGTERM else 1
        return kind, float(self.record.get("time", 0.0))

    def describe(self, log_folder: Path) -> str:
        """Return the sentence about it."""
        if self.record:
            details = f"; where: {self.record['details']}" if self.record.get("details") else ""
            return f"rank {self.rank} failed: {self.record['message']}{details}"
        how = f"exited with code {self.exit_code}"
        if self.exit_code < 0:
            how = f"was killed by {signal.Signals(-self.exit_code).name}"
            how += " (out of memory, perhaps)" if self.exit_code == -signal.SIGKILL else ""
        return f"rank {self.rank} {how} and left no message; the output of the ranks is in {log_folder}"


def threads_per_rank(spec: RunSpec, local_world_size: int) -> int:
    """Return the CPU threads of a rank: what the spec says, or this host's cores shared out evenly."""
    return spec.launcher.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_world_size)


def launch(run: LocalRun) -> None:
    """Run the task on spec.world_size ranks of this machine and return when all have finished.

    Raises:
        LaunchError: a rank failed; the others have been ended.
        Stopped: SIGINT or SIGTERM came; the ranks got it too and have ended by themselves or after the time to save.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    world_size = run.spec.world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(run.spec, world_size)))
    # A restarted or second run must not meet the keys of an earlier one in the agent's store.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    log_folder = run.log_folder / time.strftime("start-%Y%m%d-%H%M%S")
    log_folder.mkdir(parents=True, exist_ok=True)
    redirects = dict.fromkeys(range(1, world_size), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="trimaran",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # else the ranks meet at this host's full name, which need not resolve
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_folder), redirects=redirects),
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=_SHUTDOWN_S,
    )
    command = ("-m", "trimaran.launchers.rank", str(run.task), str(os.getpid()))
    try:
        with _quiet_agent():
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        raise _why(error.failures, log_folder) from error
    except SignalException as error:
        raise Stopped(int(error.sigval), _problem_of(log_folder)) from error


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Silence the agent's own log, which repeats at length what our last sentence says; put the signal handlers back that it replaces."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _why(failures: Mapping[int, Any], log_folder: Path) -> LaunchError | Stopped:
    """Return the failure that is the cause of the others."""
    found = [_Failure(rank, each.exitcode, _own_record(each.error_file_data)) for rank, each in failures.items()]
    cause = min(found, key=lambda failure: failure.order)
    if cause.exit_code == STOPPED_EXIT_CODE and not cause.record:
        return Stopped(signal.SIGTERM)
    return LaunchError(cause.describe(log_folder), cause.exit_code)


def _problem_of(log_folder: Path) -> str:
    """Return the sentence about the first failure among ranks that were told to stop, "" where none failed by itself."""
    found = []
    for file in log_folder.rglob("error.json"):  # .../RANK/error.json
        try:
            record = _own_record(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        found.append(_Failure(int(file.parent.name), 1, record))
    causes = sorted((failure for failure in found if failure.record and not failure.record.get("secondary")), key=lambda each: each.order)
    return causes[0].describe(log_folder) if causes else ""


def _own_record(data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, dict) and "time" in data else {}
