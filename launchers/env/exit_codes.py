"""How a start can end other than well: by a failure of a rank, or by a signal."""

import signal

from trimaran.runtime.train.signals import STOPPING


def exit_code_after(number: signal.Signals) -> int:
    """Return what every rank exits with when a signal stopped the run, so that it isn't taken for finished."""
    return 128 + number


def signal_behind(exit_code: int) -> signal.Signals | None:
    """Return the signal that an exit code tells of, None for any other end."""
    return next((number for number in STOPPING if exit_code == exit_code_after(number)), None)


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
