"""The progress of a run on a terminal, a pipe or in a log file. Imports rich on a terminal only."""

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, TextIO

from trimaran.runtime.kept_output import KeptOutput, OutputLog


class Screen(Protocol):
    """Display of progress."""

    def show(self, line: str, due: bool) -> None:
        """Show the progress; `due` says whether a display that keeps its lines shows it too."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Leave the display as it is."""


class _PlainScreen:
    """One line per logging interval, for log files and pipes."""

    def __init__(self, stream: TextIO | OutputLog) -> None:
        self._stream = stream

    def show(self, line: str, due: bool) -> None:
        if due:
            self.say(line)

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _LiveScreen:
    """One line, redrawn in place, for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._text: Any = import_module("rich.text").Text
        self._console: Any = import_module("rich.console").Console(file=stream, highlight=False)
        self._live: Any = import_module("rich.live").Live(console=self._console, auto_refresh=False)
        self._live.start()
        self._drawn_at_s = 0.0

    def show(self, line: str, due: bool) -> None:
        now_s = time.monotonic()
        # more than ten redraws a second are not visible and would take time from short steps
        refresh = now_s - self._drawn_at_s >= 0.1
        self._drawn_at_s = now_s if refresh else self._drawn_at_s
        self._live.update(self._text(line, no_wrap=True, overflow="ellipsis"), refresh=refresh)

    def say(self, text: str) -> None:
        self._console.print(self._text(text))

    def close(self) -> None:
        self._live.stop()


class _Screens:
    """Several displays of the same."""

    def __init__(self, screens: Sequence[Screen]) -> None:
        self._screens = screens

    def show(self, line: str, due: bool) -> None:
        for screen in self._screens:
            screen.show(line, due)

    def say(self, text: str) -> None:
        for screen in self._screens:
            screen.say(text)

    def close(self) -> None:
        for screen in self._screens:
            screen.close()


def make_screen(stream: TextIO) -> Screen:
    """Return the display for a stream: one live line on a terminal, plain lines for anything else, and for its log."""
    if not stream.isatty():
        return _PlainScreen(stream)
    if isinstance(stream, KeptOutput):
        return _Screens([_LiveScreen(stream.terminal), _PlainScreen(stream.log)])
    return _LiveScreen(stream)
