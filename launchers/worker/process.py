"""One rank's process: its logs, its failure records and the way it exits. Imports no torch."""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from trimaran.launchers.env.exit_codes import exit_code_after, write_exit_file
from trimaran.launchers.env.rank_env import RankEnv
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.launchers.terminal import is_for_users, sentence
from trimaran.launchers.worker.failure_relay import Failure, FailureRelay
from trimaran.launchers.worker.nccl_messages import WatchdogEnd, tells_of_lost_peer, watchdog_end_in
from trimaran.models.fields import printable
from trimaran.runtime.files import write_text
from trimaran.runtime.folder_lock import FolderInUse, FolderLock
from trimaran.runtime.grid import coordinates, describe_coordinates
from trimaran.runtime.kept_output import MOST_BYTES, OUTPUT_FILE, KeptOutput, OutputLog, older_part
from trimaran.runtime.pages.run_folder import ERROR_FILE
from trimaran.runtime.processes import usable_cores
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.sinks.start import SinkError

STDERR_FILE = "stderr.log"
"""Standard error of every rank; of rank 0 only what libraries write there, such as NCCL's watchdog."""
RANKS_FILE = ".ranks"
"""Beside the records of all starts: each rank of a host holds a lock on it as long as it lives."""
_TRACEBACK_FILE = "traceback.txt"
# Errors whose message is a sentence for the user; of any other class the name is reported too.
_SENTENCES = (ValueError, OSError, RuntimeError)
_TIMED_OUT = re.compile(r"time[ -]?out|timed out", re.IGNORECASE)
_CAUSE_S = 3.0  # for the failure relay to report the cause of a consequence
_POLL_S = 0.1
_CLEAN_UP_S = 2.0  # for the main thread to fail by itself and remove half-written files when another rank has failed


class Rank:
    """This process as a rank. Its attributes become known one after the other; a failure is reported with those known.

    Args:
        announces: whether this process prints the first sentence about a failure; under `trimaran train` the launcher
            does.

    Attributes:
        env: None until the launcher's environment has been read.
        step: the training step under way, None before the first.
        relay: None until the ranks are connected.
        address_file: in which rank 0 of a Slurm step gives signs of life until it leaves its address there.
        saves: whether it writes a checkpoint.
        run: the folder of its run, on rank 0 alone and for a run that its launcher has locked.
        stopped_by: the name of the signal that came while it trained, even at its last step.
        lock: of the run folder, on rank 0 where no process of ours has started the ranks, or that process is gone.
    """

    def __init__(self, *, announces: bool) -> None:
        self.env: RankEnv | None = None
        self.step: int | None = None
        self.saves = False
        self.stopped_by: str | None = None
        self.run: Path | None = None
        self.relay: FailureRelay | None = None
        self.address_file: AddressFile | None = None
        self.lock: FolderLock | None = None
        self._announces = announces
        self._folder: Path | None = None
        self._spare: Path | None = None
        self._grid = ""
        self._cause: Failure | None = None  # another rank's failure, because of which this rank exits
        self._has_cause = threading.Event()
        self._has_answered = False
        self._files: dict[int, Path] = {}  # descriptor -> where it leads
        self._log: OutputLog | None = None
        self._terminal = os.dup(2)  # the user's terminal, kept for when the output of this rank goes to a file

    @property
    def number(self) -> int:
        """The rank, 0 while it is unknown."""
        return 0 if self.env is None else self.env.rank

    def set_coordinates(self, spec: RunSpec) -> None:
        """Set this rank's coordinates on the mesh, from the run's layout."""
        self._grid = f", {describe_coordinates(coordinates(self.number, spec.axis_sizes))}"

    @property
    def where(self) -> str:
        """Node and coordinates, as far as they are known."""
        return "of unknown place" if self.env is None else f"host {self.env.node}{self._grid}"

    def keep_records(self, logs: Path, spare: Path | None = None) -> None:
        """Send this rank's output and failure records to logs/rank-N; the output of rank 0 stays on the terminal.

        A failure that finds no space there is recorded in spare/rank-N, on another disk, where that is given.
        """
        self._folder = logs / f"rank-{self.number}"
        self._spare = None if spare is None else spare / f"rank-{self.number}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._show_life(logs.parent / RANKS_FILE)
        for name in (ERROR_FILE, _TRACEBACK_FILE):  # of an earlier start of the same name
            (self._folder / name).unlink(missing_ok=True)
        if self.number == 0:
            return
        for descriptor, name in ((1, "stdout.log"), (2, STDERR_FILE)):
            self._redirect(descriptor, self._folder / name)

    def keep_output(self, logs: Path) -> None:
        """On rank 0, keep what Python writes on the terminal in logs/output.log too. After `keep_native_errors`."""
        if self.number == 0:
            self._log = OutputLog(logs / OUTPUT_FILE)
            sys.stdout = cast(TextIO, KeptOutput(sys.stdout, self._log))
            sys.stderr = cast(TextIO, KeptOutput(sys.stderr, self._log))

    def bound_output(self) -> None:
        """Have each file of this rank's output that is full begin anew; its former part stays beside it."""
        for descriptor, file in self._files.items():
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_size > MOST_BYTES:
                    os.replace(file, older_part(file))
                    self._redirect(descriptor, file)

    def _redirect(self, descriptor: int, path: Path) -> None:
        """Send what is written to a descriptor to a file."""
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
        self._files[descriptor] = path

    def _show_life(self, file: Path) -> None:
        """Lock a file in a way that the kernel undoes at the end of this process, however it ends."""
        with contextlib.suppress(OSError):  # a file system without locks, or a full disk
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)  # never closed
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def keep_native_errors(self) -> None:
        """Send to rank 0's records what libraries write to its standard error; Python's stays on the terminal.

        Other ranks and the launcher read there why NCCL's watchdog has ended it.
        """
        if self.number == 0 and self._folder is not None:
            sys.stderr.flush()
            sys.stderr = os.fdopen(self._terminal, "w", 1, errors="backslashreplace", closefd=False)
            self._redirect(2, self._folder / STDERR_FILE)

    def answer(self, number: signal.Signals) -> None:
        """On rank 0, tell a person who stops the run what it waits for. Runs in a thread, once for all signals."""
        if self.number or self._has_answered:
            return
        self._has_answered = True
        if self.saves:
            waits = f"step {self.step} is being saved, and the run ends after that"
        elif self.step is None:
            waits = "the run ends once it has begun to train"
        else:
            waits = f"the run finishes step {self.step}, or one more, saves and ends"
        again = "; press Ctrl-C again to end it at once, without saving" if number == signal.SIGINT else ""
        self._tell(f"{number.name}: {waits}{again}")

    def _tell(self, text: str) -> None:
        """Write a line on the terminal, over the live line where there is one."""
        erase, said = "\r\x1b[2K" if os.isatty(self._terminal) else "", printable(text, keep="\n")
        with contextlib.suppress(OSError):
            os.write(self._terminal, f"{erase}{said}\n".encode())
        if self._log is not None:
            self._log.write(f"{said}\n")

    def last_words_of(self, rank: int) -> WatchdogEnd | None:
        """Return why NCCL's watchdog has ended another rank; None where its records do not say so."""
        return None if self._folder is None else watchdog_end_in(self._folder.parent / f"rank-{rank}" / STDERR_FILE)

    def fail(self, error: BaseException) -> NoReturn:
        """Exit because of an error of this rank, and make the other ranks exit too."""
        text = str(error).strip()
        is_sentence = bool(text) and (isinstance(error, _SENTENCES) or is_for_users(error))
        message = sentence(error) if is_sentence else f"{type(error).__name__}: {text}"
        secondary = isinstance(error, RuntimeError | OSError) and tells_of_lost_peer(text)
        if secondary and self.relay is not None:
            self._has_cause.wait(_CAUSE_S)
        if self._cause is not None:  # this error is its consequence
            self.exit(self._cause.exit_code)
        details = self._write_traceback(error)
        exit_code = 2 if isinstance(error, SinkError) else 1  # the spec asks for what can't be
        failure = Failure(self.number, self.where, self.step, message, exit_code, "" if is_sentence else details)
        if self.relay is not None and isinstance(error, RuntimeError | OSError) and _TIMED_OUT.search(text):
            cause = self.relay.send(failure, timed_out=True)
            if cause is not None:
                self._follow(cause)
                self.exit(cause.exit_code)
        self._write_record(failure, secondary=secondary)
        if self.relay is None or self.number == 0:
            self._announce(failure)
        if self.relay is not None:
            self.relay.send(failure)
        # Not sys.exit: destroying the process groups would wait for peers that wait for this rank.
        self.exit(failure.exit_code)

    def exit_after(self, failure: Failure) -> None:
        """Exit because another rank has failed. Runs in the relay's thread and does not return."""
        self._follow(failure)
        time.sleep(_CLEAN_UP_S)
        self.exit(failure.exit_code)

    def _follow(self, failure: Failure) -> None:
        """Record and announce the failure of another rank, because of which this one exits."""
        self._write_record(failure, secondary=True)
        # Rank 0 announces a failure, unless it is the one that died without a message.
        if self.number == 0 or (self.number == 1 and failure.rank == 0):
            self._announce(failure)
            self._write_exit_file(failure.exit_code)
        self._cause = failure  # only after the record and the announcement: the main thread may exit at once
        self._has_cause.set()

    def exit(self, exit_code: int) -> NoReturn:
        """Exit with this code; rank 0 writes the exit file first."""
        if self.number == 0:
            self._write_exit_file(exit_code)
        self.release_lock()
        exit_process(exit_code)

    def keep_lock(self) -> None:
        """Lock the run folder in place of a launcher that is gone; exit where another run has taken it first."""
        end = time.monotonic() + _CAUSE_S
        while self.run is not None and self.lock is None:
            try:
                self.lock = FolderLock.of_run(self.run, "trimaran train", os.environ)
            except FolderInUse:
                if time.monotonic() > end:  # the launcher counts as alive until its parent has noticed its end
                    self.exit(exit_code_after(signal.SIGTERM))
                time.sleep(_POLL_S)
            except OSError:  # the folder is gone, or its disk is full
                return

    def release_lock(self) -> None:
        """Release the run folder; may be called again."""
        if self.lock is not None:
            self.lock.release()

    def _write_exit_file(self, exit_code: int) -> None:
        if self._announces:
            write_exit_file(exit_code)

    def _announce(self, failure: Failure) -> None:
        if self._announces:
            self._tell(f"error: {failure}")

    def _write_traceback(self, error: BaseException) -> str:
        """Return the file's path, "" where it could not be written."""
        if self._folder is None:
            if not is_for_users(error):
                traceback.print_exception(error)
            return ""
        file = self._folder / _TRACEBACK_FILE
        try:
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError:  # a full disk, for one
            return ""
        return str(file)

    def _write_record(self, failure: Failure, *, secondary: bool) -> None:
        """Write the failure for the launcher, and for torchrun's agent, which names a file for it.

        The main thread and the relay's may do so at the same time, and the launcher may read.
        """
        record: dict[str, Any] = {**asdict(failure), "secondary": secondary, "timestamp": int(failure.seconds)}
        ours = [] if self._folder is None else [self._folder / ERROR_FILE]
        agents = [Path(name) for name in (os.environ.get("TORCHELASTIC_ERROR_FILE"),) if name]
        for file in (*ours, *agents):
            try:
                write_text(file, json.dumps(record))
            except OSError:  # a full disk, for one
                if file in ours and self._spare is not None:
                    with contextlib.suppress(OSError):
                        self._spare.mkdir(parents=True, exist_ok=True)
                        write_text(self._spare / ERROR_FILE, json.dumps(record))


def exit_process(exit_code: int) -> NoReturn:
    """Flush the output and end this process by `os._exit`, without the interpreter's shutdown. Every rank ends so.

    (A forked rank that succeeds returns instead, and multiprocessing calls `os._exit`.) Threads of gloo still run at
    this point, even after destroy_process_group, and one may drop the tensors of a finished all_reduce, for which it
    needs the interpreter's lock. During the shutdown Python ends a thread that asks for the lock by unwinding its
    stack; that reaches a C++ destructor and aborts the process: "terminate called without an active exception".
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def threads_per_rank(spec: RunSpec, local_world_size: int) -> int:
    """Return the CPU threads of a rank: launcher.threads_per_rank, or an even share of this host's cores."""
    return spec.launcher.threads_per_rank or max(1, usable_cores() // local_world_size)
