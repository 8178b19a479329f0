"""Ctrl-C and SIGTERM of a command that works in its own process. Imports no torch."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trimaran.launchers.env.exit_codes import Stopped


class _Interrupted(KeyboardInterrupt):
    """A signal as an exception that `except Exception` does not catch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable(saved: Callable[[], str]) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM end the block like an error, so that half-written files are removed.

    Args:
        saved: returns a sentence about what is left, asked at the end.

    Raises:
        Stopped: one of them came.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        # A second signal during the clean-up would leave the rest of the half-written files.
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise _Interrupted(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Interrupted as interrupted:
        raise Stopped(interrupted.number, saved=saved()) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
