"""A process as a rank of a run: what it writes down about itself, and how it ends, by itself or with the others. Imports no torch."""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from trimaran.launchers.env.rank_env import RankEnv
from trimaran.launchers.worker.failure_relay import Failure, Tether
from trimaran.runtime.grid import coordinates, describe_coordinates
from trimaran.runtime.spec import RunSpec

ERROR_FILE = "error.json"
_TRACEBACK_FILE = "traceback.txt"
EXIT_FILE = "TRIMARAN_EXIT_FILE"
"""The environment variable that names a file for the exit code of the run."""
# Errors whose message is a sentence for the user; the name of any other class is part of what went wrong.
_SENTENCES = (ValueError, OSError, RuntimeError)
# What a rank says when a peer has left: the consequence of a failure, never its cause.
_PEER_LEFT = (
    "Connection reset",
    "Connection closed",
    "Connection refused",
    "Broken pipe",
    "not connected",
    "is gone",
    " lost rank ",
)
_TOLD_BY_OTHERS_S = 3.0  # for the tether to bring the cause of a consequence
_OWN_WAY_S = 2.0  # for a rank to come to its own end, and clear away what it has half written, when another has failed


class Rank:
    """This process. Its attributes become known one after the other while it starts, and are what a failure is told with.

    Args:
        announces: whether the first sentence about a failure is this process's to print; under `trimaran train` the
            launcher says it.

    Attributes:
        rank_env: None until the launcher's environment has been read.
        step: the training step under way, None before the first.
        tether: None until the ranks have met.
    """

    def __init__(self, *, announces: bool) -> None:
        self.rank_env: RankEnv | None = None
        self.step: int | None = None
        self.tether: Tether | None = None
        self._announces = announces
        self._folder: Path | None = None
        self._grid = ""
        self._cause: Failure | None = None  # another rank's, which this one ends because of
        self._told = threading.Event()
        self._terminal = os.dup(2)  # where the launcher's user looks, also after this rank's output has gone to a file

    @property
    def number(self) -> int:
        """The rank, 0 while it is not known."""
        return 0 if self.rank_env is None else self.rank_env.rank

    def take_place_in(self, spec: RunSpec) -> None:
        """Learn this rank's coordinates from the run's layout."""
        self._grid = f", {describe_coordinates(coordinates(self.number, spec.axis_sizes))}"

    @property
    def where(self) -> str:
        """Node and coordinates, as far as they are known."""
        return "of unknown place" if self.rank_env is None else f"host {self.rank_env.node}{self._grid}"

    def keep_records(self, logs: Path) -> None:
        """Write what this rank prints (but for rank 0, which has the terminal) and how it fails under logs/rank-N."""
        self._folder = logs / f"rank-{self.number}"
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in (ERROR_FILE, _TRACEBACK_FILE):  # of an earlier start of the same name
            (self._folder / name).unlink(missing_ok=True)
        if self.number == 0:
            return
        for descriptor, name in ((1, "stdout.log"), (2, "stderr.log")):
            with (self._folder / name).open("ab") as file:
                os.dup2(file.fileno(), descriptor)

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank because of an error of its own, and the others with it."""
        text = str(error).strip()
        is_sentence = bool(text) and isinstance(error, _SENTENCES)
        message = text if is_sentence else f"{type(error).__name__}: {text}"
        secondary = isinstance(error, RuntimeError | OSError) and any(words in text for words in _PEER_LEFT)
        if secondary and self.tether is not None:
            self._told.wait(_TOLD_BY_OTHERS_S)
        if self._cause is not None:  # this error is its consequence
            self.leave(self._cause.exit_code)
        details = self._write_traceback(error)
        failure = Failure(self.number, self.where, self.step, message, details="" if is_sentence else details)
        self._write_record(failure, secondary=secondary)
        if self.tether is None or self.number == 0:
            self._announce(failure)
        if self.tether is not None:
            self.tether.fail(failure)
        # Not sys.exit: leaving the groups in order would wait for peers that wait for this rank.
        self.leave(failure.exit_code)

    def end_with(self, failure: Failure) -> None:
        """End this rank because another has failed: what the tether's thread does. Does not return."""
        self._write_record(failure, secondary=True)
        if self.number == 0 or (
            self.number == 1 and failure.rank == 0
        ):  # rank 0 has said it unless it died without a word
            self._announce(failure)
            self._leave_word(failure.exit_code)
        self._cause = failure  # not before it is written down and said: the main thread may leave at once
        self._told.set()
        time.sleep(_OWN_WAY_S)
        self.leave(failure.exit_code)

    def leave(self, exit_code: int) -> NoReturn:
        """End this process now."""
        if self.number == 0:
            self._leave_word(exit_code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(exit_code)

    def _leave_word(self, exit_code: int) -> None:
        if self._announces:
            leave_word(exit_code)

    def _announce(self, failure: Failure) -> None:
        if self._announces:
            with contextlib.suppress(OSError):
                os.write(self._terminal, f"error: {failure}\n".encode())

    def _write_traceback(self, error: BaseException) -> str:
        """Return the file's path, "" where it could not be written."""
        if self._folder is None:
            traceback.print_exception(error)
            return ""
        file = self._folder / _TRACEBACK_FILE
        try:
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError:  # a full disk, for one
            return ""
        return str(file)

    def _write_record(self, failure: Failure, *, secondary: bool) -> None:
        """Leave word for the launcher, and for torchrun's agent, which names a file for it."""
        record: dict[str, Any] = {**asdict(failure), "secondary": secondary, "timestamp": int(failure.seconds)}
        ours = [] if self._folder is None else [self._folder / ERROR_FILE]
        agents = [Path(name) for name in (os.environ.get("TORCHELASTIC_ERROR_FILE"),) if name]
        for file in (*ours, *agents):
            with contextlib.suppress(OSError):
                file.write_text(json.dumps(record), encoding="utf-8")


def leave_word(exit_code: int) -> None:
    """Tell the batch script, to which srun passes on the code of any task, perhaps of one that it has ended itself."""
    file = os.environ.get(EXIT_FILE)
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{exit_code}\n", encoding="utf-8")


def threads_per_rank(spec: RunSpec, local_world_size: int) -> int:
    """Return the CPU threads of a rank: what the spec says, or this host's cores shared out evenly."""
    return spec.launcher.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_world_size)
