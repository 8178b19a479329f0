"""Stopping a run between two steps: a signal only sets a flag; the train loop checks it, saves and exits."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The signals that request a stop: to end the run, to exit before a time limit (Slurm's --signal), or by hand.

If the ranks received different ones, the first in this list decides the exit code.
"""


class StopRequest:
    """Catches the signals in STOPPING inside the ``with`` block, and restores the former handlers at its end.

    The handlers only set a flag: a checkpoint written inside a handler could interrupt a collective halfway. A second
    SIGINT raises KeyboardInterrupt, so that a person can always leave a loop that no longer reaches its check. A
    scheduler that sends SIGTERM twice still gets its checkpoint. The flag is local to this rank: ranks that must exit
    at the same step have to agree on it (a max all_reduce of ``requested``).

    with StopRequest() as stop:
        for step in range(num_steps):
            ...
            if stop.requested: save; break        # stop.signal_name is "SIGINT" or "SIGTERM"
    """

    def __init__(self) -> None:
        self._signal_name: str | None = None
        self._interrupted = False
        self._former: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has requested a stop of this rank."""
        return self._signal_name is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal received, such as "SIGTERM"; None before."""
        return self._signal_name

    def __enter__(self) -> Self:
        """Install the handlers.

        Raises:
            RuntimeError: entered outside the main thread, where Python cannot install handlers, or entered twice.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"StopRequest must be entered in the main thread, not in {threading.current_thread().name!r}"
            )
        if self._former:
            raise RuntimeError("StopRequest is already active; use one with block at a time")
        for number in STOPPING:
            self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers; the flag stays readable."""
        for number, former in self._former.items():
            # None means that the former handler was not installed from Python and cannot be restored; the default is
            # the nearest
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self._signal_name is None:
            self._signal_name = signal.Signals(number).name
