"""Start all ranks on this machine through torchrun's own API (torch.distributed.launcher): one agent, one worker process a rank."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from trimaran.runtime.spec import RunSpec

_SHUTDOWN_S = 120  # for the ranks to save after a signal, before the agent kills them


class LaunchError(RuntimeError):
    """A rank failed; the message starts with the rank that is the cause. exit_code: that rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(RuntimeError):
    """The launcher got a signal, passed it on, and the ranks have left. signal_number: which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


@dataclass(frozen=True)
class LocalRun:
    """How many ranks to start, the task file they read, and where their output goes. Rank 0 writes to this terminal."""

    spec: RunSpec
    task: Path
    log_folder: Path


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
    cores = len(os.sched_getaffinity(0))
    threads = run.spec.launcher.threads_per_rank or max(1, cores // world_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A restarted or second run must not meet the keys of an earlier one in the agent's store.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    run.log_folder.mkdir(parents=True, exist_ok=True)
    redirects = dict.fromkeys(range(1, world_size), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="trimaran",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(run.log_folder), redirects=redirects),
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=_SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "trimaran.launchers.worker", str(run.task))
    except ChildFailedError as error:
        raise _first_failure(error, run.log_folder) from error
    except SignalException as error:
        raise Stopped(int(error.sigval)) from error


def _first_failure(error: "ChildFailedError", log_folder: Path) -> LaunchError:  # type: ignore[name-defined]  # noqa: F821
    """The failure that came first in time: the others mostly say that a peer is gone."""
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", json.dumps(message))
    where = "" if rank == 0 else f"; its output is in {log_folder}"
    return LaunchError(f"rank {rank} failed (exit code {failure.exitcode}): {message}{where}", failure.exitcode)
