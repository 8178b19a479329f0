"""The output of a run's newest start on this machine, as it was on the terminal."""

import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from trimaran.launchers.slurm.jobs import copy_from, jobs_of
from trimaran.runtime.files import open_regular
from trimaran.runtime.folder_lock import holder_of
from trimaran.runtime.kept_output import MOST_BYTES, OUTPUT_FILE, newest_start, older_part

_POLL_S: Final = 0.2


def is_newest(run: Path) -> bool:
    """Whether a start on this machine has printed something, and no batch job of the run has since then."""
    log = run / "logs" / OUTPUT_FILE
    if not log.exists():
        return False
    newest = log.stat().st_mtime
    for job in jobs_of(run)[-1:]:
        with suppress(OSError):
            return newest >= Path(job["log"]).stat().st_mtime
    return True


def print_output(run: Path, out: IO[bytes], *, following: bool) -> None:
    """Copy the lines of the newest start; with `following` go on until nothing trains in the folder.

    Of a start that has filled the log, first what its former part has.
    """
    log = run / "logs" / OUTPUT_FILE
    older, begins = older_part(log), _newest_start(log)
    if begins is None and older.exists():
        copy_from(older, _newest_start(older) or 0, out)
    position = copy_from(log, begins or 0, out)
    while following:
        is_over = holder_of(run) is None  # asked for before the copy: nothing is written after the end
        with suppress(FileNotFoundError):
            if log.stat().st_size < position:  # a new file since the old one was full
                copy_from(older, position, out)
                position = 0
        position = copy_from(log, position, out)
        if is_over:
            return
        time.sleep(_POLL_S)


def _newest_start(log: Path) -> int | None:
    with open_regular(log) as file:
        return newest_start(file.read(2 * MOST_BYTES))
