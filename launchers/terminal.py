"""Sentences on the terminal's error stream, from commands and from ranks. Imports no torch."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.table import Table

from trimaran.models.fields import printable
from trimaran.runtime.files import naming
from trimaran.runtime.kept_output import OUTPUT_FILE, START, KeptOutput, OutputLog

if TYPE_CHECKING:
    from rich.live import Live

OUTPUT = "standard output"
_WIDE = 10_000  # columns where no terminal has fewer
_NO_THREAD = "can't start new thread"
_MORE_PROCESSES = "raise the limit of processes (ulimit -u; of a container, --pids-limit)"
_REMEDIES = {
    errno.ENOSPC: "free some space there, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota there, or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536; of a container, --ulimit nofile=65536)",
    errno.ENFILE: "the whole machine has too many open files: raise the sysctl fs.file-max",
    errno.EAGAIN: _MORE_PROCESSES,
    errno.ENOMEM: "raise the limit of memory (ulimit -v; of a container or a job, its memory)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f unlimited)",
    errno.ESTALE: "the file server has replaced it: try again",
}


def say(text: str, style: str | None = None) -> None:
    """Print a sentence without wrapping it: a path that is broken in two can't be copied.

    Names in it come from files and other people: control characters become escapes, `:bug:` no picture.
    """
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(printable(text, "\n"), style=style, soft_wrap=True)


def new_table(*columns: str, show_lines: bool = False) -> Table:
    """Return an empty table; `show_lines` draws a line between its rows."""
    return Table(*columns, show_lines=show_lines)


def print_table(table: Table) -> None:
    """Print a table on standard output; without a terminal its cells are not wrapped."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        with writing_output():
            console.print(table)
        return
    console.width = _WIDE
    with console.capture() as shown:
        console.print(table)
    with writing_output():
        for line in shown.get().splitlines():
            print(line.rstrip())  # rich fills every line up to the longest


def start_live() -> "Live | None":
    """Start a part of the error stream that is drawn again at each `update`; None where that is no terminal."""
    stream = sys.stderr.terminal if isinstance(sys.stderr, KeptOutput) else sys.stderr  # no log of what is redrawn
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        return None
    from rich.live import Live

    live = Live(console=console, auto_refresh=False, transient=True)
    live.start()
    return live


@contextmanager
def writing_output() -> Iterator[None]:
    """Have errors of the system in the block, which writes to standard output, name it."""
    try:
        with naming(Path(OUTPUT)):
            yield
            sys.stdout.flush()
    except OSError:
        discard_output()
        raise


def discard_output() -> None:
    """Send to nowhere what standard output still holds: to write it at the interpreter's end would fail again."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def silenced(is_on: bool) -> Iterator[None]:
    """Send what this process and those that it starts print in the block to nowhere; errors that leave it are said."""
    if not is_on:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(null, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def is_for_users(error: BaseException) -> bool:
    """Return whether an error's message is written for a user: the system's errors, wrong values, and all of ours."""
    ours = type(error).__module__.startswith("trimaran.") and isinstance(error, Exception)
    return ours or isinstance(error, ValueError | OSError) or _NO_THREAD in str(error)


def sentence(error: BaseException) -> str:
    """Return an error as a sentence for a user, with a remedy where the system's own words name none."""
    if isinstance(error, FileExistsError | NotADirectoryError) and (file := _file_at(error.filename)):
        return f"{file} is a file, and a folder is needed there; choose another folder, or move the file away"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")
    text = str(error).strip() or type(error).__name__
    return f"{text}; {_MORE_PROCESSES}" if _NO_THREAD in text else text


def _file_at(name: object) -> Path | None:
    """Return the file that stands where a path, or a folder above it, should be; None where none does."""
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else Path()
    return next((each for each in (path, *path.parents) if each.is_file()), None)


def say_error(error: BaseException) -> None:
    """Print an error as a sentence."""
    Console(stderr=True, highlight=False).print("error:", style="bold red", end=" ")
    say(sentence(error))


@contextmanager
def keeping_output(run: Path, command: str) -> Iterator[None]:
    """Keep what is said in the block in the run's output log too, after a line that tells the time and the command."""
    log, former = OutputLog(run / "logs" / OUTPUT_FILE), sys.stderr
    log.write(f"{START}{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {command}\n")
    sys.stderr = cast(TextIO, KeptOutput(former, log))
    try:
        yield
    finally:
        sys.stderr = former


def run_main(main: Callable[[], int]) -> int:
    """Return the exit code of a program's main function, 2 after an error that is written for users."""
    try:
        return main()
    except Exception as error:
        if not is_for_users(error):
            raise
        say_error(error)
        return 2


class TerminalHandler(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a record; logging calls this."""
        say(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


def log_to_terminal() -> None:
    """Say what this package logs, and of what other packages log the warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[TerminalHandler()])
    logging.getLogger("trimaran").setLevel(logging.INFO)


@contextmanager
def logs_said() -> Iterator[None]:
    """Say in the block what this package logs, unless the program has handlers for it."""
    log = logging.getLogger("trimaran")
    if log.hasHandlers():
        yield
        return
    handler, level = TerminalHandler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
