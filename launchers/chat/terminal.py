"""Where questions come from and answers go: a terminal by prompt_toolkit, or pipes, where each line is a turn."""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from trimaran.launchers.terminal import writing_output
from trimaran.models.fields import printable

_MOST_BYTES: Final = 16 << 20  # of one line of a pipe
_READ_BYTES: Final = 1 << 16
_MOST_WAITING: Final = 16  # lines that are read ahead
_SHOWN: Final = "\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{IDEOGRAPHIC SPACE}\u200c\u200d"
"""What is no printable character for Python, and harmless in a terminal: spaces, and joiners of letters and emoji."""
_INSTALL: Final = "a conversation in a terminal needs the package prompt_toolkit: pip install 'trimaran[serve]'"


class Reader(Protocol):
    """Where questions come from.

    Attributes:
        is_terminal: whether somebody types them.
    """

    is_terminal: bool

    async def read(self) -> str:
        """Return the next question or command. EOFError at the end, KeyboardInterrupt for Ctrl-C at the prompt."""
        ...


class PipeReader:
    """Lines of standard input, which is no terminal.

    A thread of its own waits for them, so that a signal or the end of the ranks is seen meanwhile.
    """

    is_terminal = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: asyncio.Queue[str | Exception] = asyncio.Queue()
        self._places = threading.Semaphore(_MOST_WAITING)
        self._begun = False

    async def read(self) -> str:
        """Return the next line. Raises ValueError where one has no end."""
        if not self._begun:
            self._begun = True
            loop = asyncio.get_running_loop()

            def put(found: str | Exception) -> None:
                self._places.acquire()
                loop.call_soon_threadsafe(self._lines.put_nowait, found)

            # A daemon: a read that never ends must not keep the command.
            threading.Thread(target=self._run, args=(put,), daemon=True).start()
        found = await self._lines.get()
        self._places.release()
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self, put: Callable[[str | Exception], None]) -> None:
        with suppress(RuntimeError):  # the conversation has ended meanwhile
            try:
                self._pass_on(put)
            except OSError as error:
                put(error)

    def _pass_on(self, put: Callable[[str | Exception], None]) -> None:
        waiting = bytearray()
        while data := os.read(self._descriptor, _READ_BYTES):
            *lines, rest = data.split(b"\n")
            for line in lines:
                put(_text_of(bytes(waiting) + line))
                waiting.clear()
            waiting += rest
            if len(waiting) > _MOST_BYTES:
                put(ValueError(f"a line of standard input has more than {_MOST_BYTES >> 20} MiB; send less"))
                return
        if waiting:
            put(_text_of(bytes(waiting)))
        put(EOFError())


class TerminalReader:
    """Questions that somebody types, with the keys that /help tells of.

    Args:
        commands: names that Tab completes after a slash.
    """

    is_terminal = True

    def __init__(self, commands: list[str]) -> None:
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.output import create_output
        except ImportError as error:
            raise ValueError(_INSTALL) from error
        completer = WordCompleter([f"/{name}" for name in commands], sentence=True)
        # Where answers go to a file, the prompt is still shown.
        shown = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._session: Any = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=completer,
            complete_while_typing=False,
            output=create_output(stdout=shown),
        )

    async def read(self) -> str:
        """Return what was typed."""
        text: str = await self._session.prompt_async()
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _keys() -> Any:
    """Return what Enter and Alt-Enter do."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def go_on(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class Answers:
    """Standard output, to which answers go as they come.

    On a terminal the control characters of a model's text, which could move the cursor or set the window's title,
    become escapes. Characters that the encoding lacks become "?".
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def show(self, text: str) -> None:
        """Write text at once. BrokenPipeError where the reader is gone."""
        if self._is_terminal:
            text = printable(text, _SHOWN)
        with writing_output():
            sys.stdout.write(text.encode(self._encoding, "replace").decode(self._encoding))

    def show_json(self, record: dict[str, Any]) -> None:
        """Write a record as a line. BrokenPipeError where the reader is gone."""
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode(self._encoding)
        except UnicodeEncodeError:
            line = json.dumps(record)
        self.show(f"{line}\n")


def _text_of(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")
