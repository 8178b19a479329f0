"""Sentences on the terminal's error stream, from commands and from ranks. Imports no torch."""

import errno
from collections.abc import Callable

from rich.console import Console

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
    """Print a sentence without wrapping it: a path that is broken in two can't be copied."""
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def is_for_users(error: BaseException) -> bool:
    """Return whether an error's message is written for a user: the system's errors, wrong values, and all of ours."""
    ours = type(error).__module__.startswith("trimaran.") and isinstance(error, Exception)
    return ours or isinstance(error, ValueError | OSError) or _NO_THREAD in str(error)


def sentence(error: BaseException) -> str:
    """Return an error as a sentence for a user, with a remedy where the system's own words name none."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")
    text = str(error).strip() or type(error).__name__
    return f"{text}; {_MORE_PROCESSES}" if _NO_THREAD in text else text


def say_error(error: BaseException) -> None:
    """Print an error as a sentence."""
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(sentence(error), markup=False, soft_wrap=True)


def run_main(main: Callable[[], int]) -> int:
    """Return the exit code of a program's main function, 2 after an error that is written for users."""
    try:
        return main()
    except Exception as error:
        if not is_for_users(error):
            raise
        say_error(error)
        return 2
