"""What every function that starts ranks does around its work. Imports no torch."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.env.rank_env import is_rank
from trimaran.launchers.local.fork_server import end_outdated_fork_server
from trimaran.launchers.terminal import logs_said

_SHOWN = 60  # characters of a value in an error
_Value = TypeVar("_Value")


def _got(value: object) -> str:
    return f"got {repr(value)[:_SHOWN]}, of type {type(value).__name__}"


def expect(name: str, value: object, kinds: type | tuple[type, ...], words: str) -> None:
    """Raise TypeError, in a sentence, where an argument has none of the types.

    Args:
        words: what it must be, after "must be".
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {words}; {_got(value)}")


def list_of(name: str, values: Iterable[_Value], kinds: type | tuple[type, ...], words: str) -> list[_Value]:
    """Return the values of an argument; an iterator is read here, once.

    Raises:
        TypeError: it is no iterable of values that have one of the types.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise TypeError(f"{name} must be a list, each of it {words}; {_got(values)}")
    listed = list(values)
    for value in listed:
        expect(f"each of {name}", value, kinds, words)
    return listed


@contextmanager
def ranks_of_a_call(name: str) -> Iterator[None]:
    """Check that this program may start ranks; in the block its log is said, and Ctrl-C is Python's KeyboardInterrupt.

    Args:
        name: of the function, for errors.

    Raises:
        ValueError: this is not the main thread, or a rank that a launcher has started.
        KeyboardInterrupt: after Ctrl-C, once the ranks have saved and ended; its text says where the run can go on.
    """
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        raise ValueError(
            f"{name} must be called in the main thread, to which Python gives signals such as Ctrl-C; this is the "
            f"thread {thread.name!r}: call it in the main thread, or start `trimaran` as a process"
        )
    if is_rank(os.environ):
        raise ValueError(
            f"{name} starts ranks itself, and this process is one of several that torchrun, srun or mpirun has "
            "started: start the script by python alone, or give that launcher `-m trimaran.launchers.worker SPEC`"
        )
    end_outdated_fork_server()
    with logs_said():
        try:
            yield
        except Stopped as stopped:
            if stopped.signal_number != signal.SIGINT:
                raise
            raise KeyboardInterrupt(str(stopped)) from None
