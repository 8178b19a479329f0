"""multiprocessing's process from which the ranks of this machine are forked: it imports torch once for all of them.

The program that starts ranks is the command line, a user's script or a notebook. Ranks take nothing of it but its
environment and its current folder.
"""

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, spawn
from pathlib import Path
from typing import Any

from trimaran.runtime.files import read_bytes
from trimaran.runtime.processes import children_of

# The path of a socket has at most 107 bytes.
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_THREADS = "OMP_NUM_THREADS"
_MOST_BYTES = 64 << 20  # of an environment; the kernel allows less

logger = logging.getLogger(__name__)


def start_fork_server(threads: int) -> None:
    """Start the process from which ranks are forked, unless it is there; it has a single thread and uses no GPU.

    Args:
        threads: CPU threads of a rank, unless OMP_NUM_THREADS is set.
    """
    multiprocessing.set_forkserver_preload(["trimaran.launchers.local.preload"])
    is_set = _THREADS in os.environ
    os.environ.setdefault(_THREADS, str(threads))  # torch reads it when it is imported
    try:
        with _short_temporary_folder(), interrupts_ignored():
            forkserver.ensure_running()
    finally:
        if not is_set:  # a notebook's own torch has all cores
            del os.environ[_THREADS]


def end_outdated_fork_server() -> None:
    """End the fork server of a former run of this program where the environment has changed since it was started.

    One that has other children stays, which is told.
    """
    server = _server()
    had = None if server is None else _environment_of(server)
    if server is None or had is None:
        return
    changed = sorted(name for name in had.keys() | os.environ.keys() if had.get(name) != os.environ.get(name))
    if _THREADS not in os.environ:
        changed = [name for name in changed if name != _THREADS]  # ours
    if not changed:
        return
    if children_of(server):
        logger.warning(
            "the ranks do not see that %s of the environment has changed: other processes are still forked from where "
            "they are; end those first",
            changed[0],
        )
        return
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def forks() -> list[int]:
    """Return the processes that are children of the fork server, the ranks and others."""
    server = _server()
    return children_of(server) if server else []


@contextmanager
def bare_ranks() -> Iterator[None]:
    """Have the processes that this thread starts import nothing of its program, and begin in its current folder.

    By itself multiprocessing runs the main program's file in each of them, in which a script that does not ask for
    `__name__ == "__main__"` would start its run again, and has them begin where the program once began.
    """
    usual, thread = spawn.get_preparation_data, threading.get_ident()

    def prepare(name: str) -> dict[str, Any]:
        found: dict[str, Any] = usual(name)
        if threading.get_ident() != thread:
            return found
        main = ("init_main_from_name", "init_main_from_path")
        return {key: value for key, value in found.items() if key not in main} | {"dir": os.getcwd()}

    spawn.get_preparation_data = prepare
    try:
        yield
    finally:
        spawn.get_preparation_data = usual


def _server() -> int | None:
    found: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return found


def _environment_of(pid: int) -> dict[str, str] | None:
    """Return the environment in which a process was started; None where the system doesn't tell."""
    try:
        text = read_bytes(Path(f"/proc/{pid}/environ"), _MOST_BYTES)
    except OSError:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in text.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Have what is started in the block, which takes milliseconds, ignore SIGINT from its beginning."""
    usual = signal.getsignal(signal.SIGINT)
    # Python lets no other thread change it, and can't put back what another language has set.
    if usual is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Keep multiprocessing's socket out of a long TMPDIR, such as batch systems set."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > _LONGEST_TMPDIR:
        short = (each for each in _SHORT_FOLDERS if os.access(each, os.W_OK | os.X_OK))
        tempfile.tempdir = next(short, None)
        if tempfile.tempdir is None:
            raise ValueError(
                f"TMPDIR {usual} has {len(os.fsencode(usual))} characters, a socket there can have a TMPDIR of at most "
                f"{_LONGEST_TMPDIR}, and {', '.join(_SHORT_FOLDERS)} can't be written; set TMPDIR to a shorter folder"
            )
    try:
        yield
    finally:
        tempfile.tempdir = usual
