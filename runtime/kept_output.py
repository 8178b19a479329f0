"""What a run printed on the terminal, kept in its folder: a log of bounded size, and streams that fill it."""

import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

OUTPUT_FILE: Final = "output.log"
"""In RUN/logs: the launcher's lines and those of rank 0, all starts one after the other."""
OLDER: Final = ".old"
"""Ends the name of what a log had before it was full."""
MOST_BYTES: Final = 8 << 20
"""Of one log; it and its former part hold the newest 8 to 16 MiB."""
START: Final = "--- "
"""How the line begins that a start writes first."""
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


class OutputLog(io.TextIOBase):
    """A log that several processes add lines to.

    It is opened anew for each text, so that all write to the same file when one of them has begun a new one. What comes
    before its folder is there waits for it: a run that can't begin leaves none. A disk that is full keeps no line, and
    ends no run.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        super().__init__()
        self._path, self._most_bytes = path, most_bytes
        self._waiting = ""

    def write(self, text: str) -> int:
        """Add a text."""
        self._waiting += text
        if not self._path.parent.is_dir():
            return len(text)
        added, self._waiting = self._waiting, ""
        with suppress(OSError):
            self._make_room()
            with self._path.open("ab") as file:
                file.write(added.encode(errors="replace"))
        return len(text)

    def _make_room(self) -> None:
        """Put a full log aside. Before a text is added, so that the newest lines are always in the log itself."""
        with suppress(FileNotFoundError):  # another process has just done it
            if self._path.stat().st_size > self._most_bytes:
                os.replace(self._path, older_part(self._path))


class KeptOutput(io.TextIOBase):
    """A stream that writes to the terminal, and whole lines without colours to a log."""

    def __init__(self, terminal: TextIO, log: OutputLog) -> None:
        super().__init__()
        self.terminal, self.log = terminal, log
        self._line = ""

    def write(self, text: str) -> int:
        """Write a text to both; the log gets a line once it has ended."""
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            # what is left of a line that was drawn again and again; the last \r may be its end
            plain = (_ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2] for line in lines)
            self.log.write("".join(f"{line}\n" for line in plain))
        return self.terminal.write(text)

    def flush(self) -> None:
        """Flush the terminal's stream; the log holds nothing back."""
        self.terminal.flush()

    def isatty(self) -> bool:
        """Whether a person may look on."""
        return self.terminal.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the terminal's stream."""
        return self.terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the terminal's stream, by which rich chooses its characters."""
        return self.terminal.encoding


def older_part(log: Path) -> Path:
    """Return the file that has what a log had before it was full."""
    return log.with_name(log.name + OLDER)


def newest_start(log: bytes) -> int | None:
    """Return where the lines of the newest start begin in a log; None where none begins in it."""
    mark = START.encode()
    found = log.rfind(b"\n" + mark)
    if found >= 0:
        return found + 1
    return 0 if log.startswith(mark) else None
