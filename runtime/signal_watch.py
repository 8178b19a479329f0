"""Hearing of a signal at once, while the main thread is in a call that takes long. Imports no torch."""

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class SignalWatch:
    """Calls a function in a thread of its own for every signal that has a handler in Python.

    Python runs a handler in the main thread, once the call that it is in has returned: after a backward pass, or after
    a wait for other ranks. The number of the signal is written to a pipe at once (`signal.set_wakeup_fd`). The handlers
    stay as they are. Outside the main thread, which alone can have a handler, it does nothing.
    """

    def __init__(self, heard: Callable[[signal.Signals], None]) -> None:
        self._heard = heard
        self._writer: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reader, self._former), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            signal.set_wakeup_fd(self._former)
            os.close(self._writer)
            self._writer = None
            self._thread.join()

    def _listen(self, reader: int, former: int) -> None:
        while numbers := os.read(reader, 64):  # b"" once the other end is closed
            for number in numbers:
                self._heard(signal.Signals(number))
            if former >= 0:
                os.write(former, numbers)
        os.close(reader)
