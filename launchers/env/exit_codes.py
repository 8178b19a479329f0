"""Everything about exit codes: their meaning, the exit file that a batch script reads, and errors that carry one."""

import contextlib
import os
import signal
from pathlib import Path

from trimaran.runtime.train.signals import STOPPING

EXIT_FILE = "TRIMARAN_EXIT_FILE"
"""The environment variable that names a file for the exit code of the run."""
SILENT_EXIT_CODE = 137
"""Exit code of the ranks when one died without a message: 128 + SIGKILL, after which no process can leave one."""
NODES_REFUSED = 75
"""Exit code of a preflight that has found nodes that should not be used."""


def exit_code_after(number: int) -> int:
    """Return the exit code that stands for a signal, as in a shell: not 0, because the run is not finished."""
    return 128 + number


def exit_code_of(return_code: int) -> int:
    """Return the exit code of a process from Python's return code, which is minus the signal that ended it."""
    return return_code if return_code >= 0 else exit_code_after(-return_code)


STOPPED_BY_USR1 = exit_code_after(signal.SIGUSR1)
"""Exit code of the ranks when Slurm's signal before the time limit has stopped them."""


def signal_behind(exit_code: int) -> signal.Signals | None:
    """Return the signal that an exit code stands for, None for any other end."""
    return next((number for number in STOPPING if exit_code == exit_code_after(number)), None)


def write_exit_file(exit_code: int) -> None:
    """Write the exit code for the batch script: srun's own code may be that of a task that srun has ended itself."""
    file = os.environ.get(EXIT_FILE)
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{exit_code}\n", encoding="utf-8")


class LaunchError(RuntimeError):
    """A rank failed; the message starts with the rank that is the cause. exit_code: that rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(RuntimeError):
    """A signal stopped the run and the ranks have exited.

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
