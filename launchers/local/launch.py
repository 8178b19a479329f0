"""Start all ranks on this machine through torchrun's own API: one agent, and one worker process for each rank.

`train_here` is a whole run on this machine, for whoever asks for it: the command line or Python.
"""

import fcntl
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimaran.launchers.data.prepare_run import lock_run, prepare_run, try_to_report, what_is_saved
from trimaran.launchers.data.run_plan import with_plan
from trimaran.launchers.env.exit_codes import LaunchError, Stopped, exit_code_of, signal_behind
from trimaran.launchers.env.network import LOOPBACK, check_loopback
from trimaran.launchers.env.rank_env import node_name
from trimaran.launchers.local.torch_elastic import Node, get_ready, run_ranks
from trimaran.launchers.terminal import keeping_output, say
from trimaran.launchers.worker.entry import run_task_of_launcher
from trimaran.launchers.worker.failure_relay import DIED_SILENTLY, Failure
from trimaran.launchers.worker.nccl_messages import WatchdogEnd, watchdog_end_in
from trimaran.launchers.worker.process import RANKS_FILE, STDERR_FILE
from trimaran.models.fields import counted
from trimaran.runtime.files import read_json
from trimaran.runtime.grid import coordinates, describe_coordinates
from trimaran.runtime.pages.run_folder import ERROR_FILE
from trimaran.runtime.scratch import scratch_folder
from trimaran.runtime.spec import RunSpec, describe, load_spec

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.chips import Chip

_POLL_S, _TOLD_S, _LEAVE_S = 0.05, 5.0, 600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalRun:
    """The spec (which has the number of ranks), the ranks' task file, and the folder of their output.

    Rank 0 writes to this terminal.

    Args:
        keeps_logs: whether that folder is still there when an error is read.
    """

    spec: RunSpec
    task: Path
    log_folder: Path
    keeps_logs: bool = False


@dataclass(frozen=True)
class _Ended:
    """How one rank ended, and its failure record (`launchers/worker/process.py`), empty if it has written none.

    last_words: why NCCL's watchdog has ended it, as far as its output tells.
    """

    rank: int
    exit_code: int
    record: Mapping[str, Any]
    last_words: WatchdogEnd | None

    @property
    def order(self) -> tuple[int, float]:
        """Sort key that puts the cause first.

        An error comes before a death without a message, then ranks that lost a peer, then those that the agent ended.
        """
        secondary = bool(self.record.get("secondary"))
        if not self.record and self.last_words is not None:
            secondary = self.last_words.is_consequence
        kind = 0 if self.record and not secondary else 2 if secondary else 3 if self.exit_code == -signal.SIGTERM else 1
        return kind, float(self.record.get("seconds", 0.0))

    def describe(self, reported: Failure | None, spec: RunSpec, log_folder: Path | None) -> str:
        """Return the sentence about this rank.

        Args:
            reported: another rank's record of its failure, if one saw it.
            log_folder: with what the ranks have printed; None for one that goes with the command.
        """
        if self.record:
            return str(_failure_in(self.record))
        if reported is not None and reported.message != DIED_SILENTLY:
            return str(reported)
        how = f"exited with code {self.exit_code}"
        if self.last_words is not None:
            how = f"aborted ({self.last_words.message})"
        elif self.exit_code < 0:
            how = f"was killed by {signal.Signals(-self.exit_code).name}"
            how += {-signal.SIGKILL: " (out of memory, perhaps)", -signal.SIGABRT: " (what it printed says why)"}.get(
                self.exit_code, ""
            )
        grid = describe_coordinates(coordinates(self.rank, spec.axis_sizes))
        where = f"host {node_name(os.environ)}, {grid}" if reported is None else reported.where
        step = "" if reported is None or reported.step is None else f" at step {reported.step}"
        return f"rank {self.rank} ({where}) {how}{step} and left no message" + (
            "" if log_folder is None else f"; the output of the ranks is in {log_folder}"
        )


def train_here(
    spec: RunSpec, chip: "Chip | Machine | None" = None, *, command: str, kept: ExitStack | None = None
) -> Path:
    """Prepare a run, start its ranks on this machine, train, and write the report; return the run folder.

    A run whose folder has a checkpoint resumes there. What is said meanwhile is kept in the run's output log.

    Args:
        chip: for which the plan is made; None: for this machine, as far as it is known.
        command: what the output log says was called.
        kept: whose end is the end of what is kept; None: the end of this call.

    Raises:
        ValueError, OSError: it can't start as its spec says; a sentence.
        LaunchError: a rank failed.
        Stopped: a signal stopped the ranks, which have saved.
    """
    folder = Path(spec.train.output_dir)
    with ExitStack() as own, lock_run(folder):
        (kept or own).enter_context(keeping_output(folder, command))
        get_ready(spec, spec.world_size)
        task = prepare_run(spec, folder, chip)
        say(f"starting {counted(spec.world_size, 'rank')} ({dict(describe(spec))['layout']}); run folder {folder}")
        try:
            launch(LocalRun(spec, task, folder / "logs", keeps_logs=True))
        except Stopped as stopped:
            raise Stopped(stopped.signal_number, stopped.problem, what_is_saved(folder)) from stopped
        except LaunchError as error:
            raise LaunchError(with_plan(str(error), folder), error.exit_code) from error
        finally:
            try_to_report(folder)
    return folder


def launch_folder(folder: Path, logs: Path | None = None) -> None:
    """Run folder/task.json on the ranks of folder/spec.yaml on this machine; see `launch`.

    Args:
        logs: of the ranks; None: in the folder, and gone with it.
    """
    spec = load_spec(folder / "spec.yaml")
    own = folder / "logs" if logs is None else logs
    launch(LocalRun(spec, folder / "task.json", own, keeps_logs=logs is not None))


def launch(run: LocalRun) -> None:
    """Run the task on spec.world_size ranks of this machine and return when all have finished.

    Raises:
        AddressError: they could not meet.
        LaunchError: a rank failed; the others have been ended.
        Stopped: a signal came; it was passed on to the ranks, and they have ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from trimaran.launchers.rendezvous.store import serve_store

    check_loopback()
    log_folder = run.log_folder / time.strftime("start-%Y%m%dT%H%M%S")
    log_folder.mkdir(parents=True, exist_ok=True)
    _wait_for_former_ranks(run.log_folder)
    node = Node("local", serve_store(LOOPBACK, 0), LOOPBACK, 1, run.spec.world_size, log_folder / "torchrun")
    with scratch_folder("records") as spare:
        try:
            run_ranks(node, run.spec, run_task_of_launcher, str(run.task), str(log_folder), str(spare))
        except ChildFailedError as error:
            raise _why(
                error.failures,
                _read_records(spare) | _read_records(log_folder),
                run.spec,
                log_folder,
                is_kept=run.keeps_logs,
            ) from error
        except SignalException as error:
            problem = _problem_of(_read_records(spare) | _read_records(log_folder))
            raise Stopped(int(error.sigval), problem) from error


def _wait_for_former_ranks(logs: Path) -> None:
    """Wait until the ranks of a start whose launcher was killed have saved and left: they would write the same files.

    Raises:
        LaunchError: they don't leave.
    """
    begun, is_told = time.monotonic(), False
    with (logs / RANKS_FILE).open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited_s = time.monotonic() - begun
            except OSError:  # a file system without locks
                return
            if waited_s > _TOLD_S and not is_told:
                logger.info("waiting for ranks of an earlier start, which save and leave")
                is_told = True
            if waited_s > _LEAVE_S:
                raise LaunchError(
                    f"ranks of an earlier start have run on in {logs.parent} for {_LEAVE_S:g} s; end them", 1
                )
            time.sleep(_POLL_S)


def _why(
    failures: Mapping[int, Any],
    records: Mapping[int, Mapping[str, Any]],
    spec: RunSpec,
    log_folder: Path,
    *,
    is_kept: bool = True,
) -> LaunchError | Stopped:
    """Return the failure that is the cause of the others.

    Args:
        is_kept: whether the folder is still there when the error is read.
    """
    if not is_kept:
        records = {rank: {**each, "details": ""} for rank, each in records.items()}

    def last_words(rank: int) -> WatchdogEnd | None:
        aborted = failures[rank].exitcode == -signal.SIGABRT
        return watchdog_end_in(log_folder / f"rank-{rank}" / STDERR_FILE) if aborted else None

    cause = min(
        (_Ended(rank, each.exitcode, records.get(rank, {}), last_words(rank)) for rank, each in failures.items()),
        key=lambda ended: ended.order,
    )
    stopped_by = signal_behind(cause.exit_code)
    if stopped_by is not None and not cause.record:
        return Stopped(stopped_by)
    reported = next((failure for failure in map(_failure_in, records.values()) if failure.rank == cause.rank), None)
    return LaunchError(cause.describe(reported, spec, log_folder if is_kept else None), exit_code_of(cause.exit_code))


def _problem_of(records: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the sentence about the first failure among ranks that a signal stopped, "" where none failed."""
    causes = sorted(
        (_failure_in(record) for record in records.values() if not record.get("secondary")),
        key=lambda failure: failure.seconds,
    )
    return str(causes[0]) if causes else ""


def _read_records(log_folder: Path) -> dict[int, Mapping[str, Any]]:
    """Return the ranks' failure records, by rank."""
    found = {}
    for file in log_folder.glob(f"rank-*/{ERROR_FILE}"):
        try:
            found[int(file.parent.name.removeprefix("rank-"))] = read_json(file)
        except (OSError, ValueError):
            continue
    return found


def _failure_in(record: Mapping[str, Any]) -> Failure:
    return Failure(**{each.name: record[each.name] for each in fields(Failure)})
