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
        with suppress(OSError), self._path.open("ab") as file:
            file.write(added.encode(errors="replace"))
            if file.tell() > self._most_bytes:
                os.replace(self._path, self._path.with_name(self._path.name + OLDER))
        return len(text)


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
            plain = (_ESCAPES.sub("", line).rpartition("\r")[2] for line in lines)
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


def newest_start(log: bytes) -> int:
    """Return where the lines of the newest start begin in a log."""
    mark = START.encode()
    return 0 if log.startswith(mark) and log.count(b"\n" + mark) == 0 else log.rfind(b"\n" + mark) + 1
