"""The supervisor of one worker that prepares data.

It starts the worker anew where that dies, and ends it where one document takes too long: a library may hold the
interpreter, so the worker can't do that itself. It imports nothing large and takes a few megabytes.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from trimaran.runtime.data.engine.watch import Board, note_slow
from trimaran.runtime.scratch import scratch_folder

MOST_FAILURES: Final = 5
"""Deaths in a row of a worker that has not begun a document."""
_MEMORY: Final = Path("/dev/shm")
"""A write to a mapped file on a disk may wait for the disk."""
_POLL_S = 0.2
_GRACE_S = 10.0


def supervise(arguments: Sequence[str], timeout_s: float) -> int:
    """Keep a worker running until its scheduler has ended or a signal comes; return the exit code of the last one.

    Args:
        arguments: of `python -m trimaran.launchers.data`, for the worker; the file of the board is added.
        timeout_s: the most seconds of one document.
    """
    failures = 0
    memory = _MEMORY if _MEMORY.is_dir() else None
    with scratch_folder("worker", memory) as folder, _stop_signals() as stop:
        path = folder / "board"
        board = Board(path)
        command = [sys.executable, "-P", "-m", "trimaran.launchers.data", *arguments]
        command += ["--board", str(path), "--parent", str(os.getpid())]
        while True:
            begun = board.begun
            worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            _wait(worker, board, timeout_s, stop)
            board.end()
            failures = 0 if board.begun > begun else failures + 1
            if worker.returncode == 0 or stop or failures > MOST_FAILURES:
                return worker.returncode
            how = f"code {worker.returncode}" if worker.returncode > 0 else signal.Signals(-worker.returncode).name
            print(f"a worker of the data ended by {how} and is started again", file=sys.stderr)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list to which the signals that ask this process to end are added."""
    got: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: got.append(number)) for number in numbers]
    try:
        yield got
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait(worker: "subprocess.Popen[bytes]", board: Board, timeout_s: float, stop: Sequence[int]) -> None:
    """Wait until the worker has ended, or end it: after a signal, or where a document takes too long."""
    while worker.poll() is None:
        overdue = board.overdue(timeout_s)
        if overdue is not None:
            note_slow(*overdue)
            worker.kill()
        if stop:
            worker.terminate()
        with suppress(subprocess.TimeoutExpired):
            worker.wait(_GRACE_S if stop else _POLL_S)
        if stop:
            worker.kill()
