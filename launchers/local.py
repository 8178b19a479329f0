"""Start all ranks on this machine through torchrun's own API (torch.distributed.launcher): one agent, one worker process a rank."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from trimaran.launchers.outcome import STOPPED_EXIT_CODE, LaunchError, Stopped
from trimaran.launchers.rank import ERROR_FILE, threads_per_rank
from trimaran.launchers.tether import Failure
from trimaran.launchers.worker import run_task_of_launcher
from trimaran.runtime.spec import RunSpec

_SHUTDOWN_S = 120  # for the ranks to save after a signal, before the agent kills them


@dataclass(frozen=True)
class LocalRun:
    """How many ranks to start, the task file they read, and where their output goes. Rank 0 writes to this terminal."""

    spec: RunSpec
    task: Path
    log_folder: Path


@dataclass(frozen=True)
class _Ended:
    """How one rank ended, and the record that it left (`launchers/rank.py`), empty if it could not leave any."""

    rank: int
    exit_code: int
    record: Mapping[str, Any]

    @property
    def order(self) -> tuple[int, float]:
        """Sorts the cause first: an error, then a death without a word, then ranks that lost a peer, then those that the agent ended."""
        secondary = bool(self.record.get("secondary"))
        kind = 0 if self.record and not secondary else 2 if secondary else 3 if self.exit_code == -signal.SIGTERM else 1
        return kind, float(self.record.get("seconds", 0.0))

    def describe(self, told: Failure | None, log_folder: Path) -> str:
        """Return the sentence about it; `told` is what another rank wrote down about it."""
        if self.record:
            return str(_failure_in(self.record))
        how = f"exited with code {self.exit_code}"
        if self.exit_code < 0:
            how = f"was killed by {signal.Signals(-self.exit_code).name}"
            how += " (out of memory, perhaps)" if self.exit_code == -signal.SIGKILL else ""
        where = "" if told is None else f" ({told.where})"
        step = "" if told is None or told.step is None else f" at step {told.step}"
        return f"rank {self.rank}{where} {how}{step} and left no message; the output of the ranks is in {log_folder}"


def get_ready(spec: RunSpec) -> None:
    """Start the process that the ranks are forked from, which meanwhile imports what all of them need; otherwise each would take the seconds anew.

    It has no second thread and touches no GPU, so that a fork of it is as good as a process of its own.
    """
    # Read when torch is imported, so it must be right before that.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(spec, spec.world_size)))
    multiprocessing.set_forkserver_preload(["trimaran.launchers.work"])
    forkserver.ensure_running()


def launch(run: LocalRun) -> None:
    """Run the task on spec.world_size ranks of this machine and return when all have finished.

    Raises:
        LaunchError: a rank failed; the others have been ended.
        Stopped: SIGINT or SIGTERM came; the ranks got it too and have ended by themselves or after the time to save.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    world_size = run.spec.world_size
    get_ready(run.spec)
    log_folder = run.log_folder / time.strftime("start-%Y%m%d-%H%M%S")
    log_folder.mkdir(parents=True, exist_ok=True)
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
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(log_folder / "torchrun")),
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=_SHUTDOWN_S,
    )
    try:
        with _quiet_agent():
            elastic_launch(config, run_task_of_launcher)(str(run.task), str(log_folder))
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
    records = _read_records(log_folder)
    cause = min((_Ended(rank, each.exitcode, records.get(rank, {})) for rank, each in failures.items()), key=lambda ended: ended.order)
    if cause.exit_code == STOPPED_EXIT_CODE and not cause.record:
        return Stopped(signal.SIGTERM)
    told = next((failure for failure in map(_failure_in, records.values()) if failure.rank == cause.rank), None)
    exit_code = 128 - cause.exit_code if cause.exit_code < 0 else cause.exit_code
    return LaunchError(cause.describe(told, log_folder), exit_code)


def _problem_of(log_folder: Path) -> str:
    """Return the sentence about the first failure among ranks that were told to stop, "" where none failed by itself."""
    records = [record for record in _read_records(log_folder).values() if not record.get("secondary")]
    causes = sorted((_failure_in(record) for record in records), key=lambda failure: failure.seconds)
    return str(causes[0]) if causes else ""


def _read_records(log_folder: Path) -> dict[int, Mapping[str, Any]]:
    """Return what the ranks wrote down about failures, by rank."""
    found = {}
    for file in log_folder.glob(f"rank-*/{ERROR_FILE}"):
        try:
            found[int(file.parent.name.removeprefix("rank-"))] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found


def _failure_in(record: Mapping[str, Any]) -> Failure:
    return Failure(**{each.name: record[each.name] for each in fields(Failure)})
