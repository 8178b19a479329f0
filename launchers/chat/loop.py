"""The loop of a conversation: read a line, run a command or put the question, until the end. No torch."""

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trimaran.launchers.chat.asking import AnswerError
from trimaran.launchers.chat.commands import run_command
from trimaran.launchers.chat.session import INTERRUPTED, Session
from trimaran.launchers.chat.terminal import Answers, Reader
from trimaran.launchers.terminal import say, say_error
from trimaran.runtime.infer.batching.messages import BackendGoneError

_GONE: Final = 1
_BAD: Final = 2
_ENDS: Final = {
    "length": "the answer ended at max_new_tokens ({}); /set max_new_tokens changes it",
    "context": "the answer ended because the model's context is full",
}


async def converse(session: Session, reader: Reader, answers: Answers, folder: Path) -> int:
    """Hold a conversation to its end; return the exit code.

    In a terminal an error is told and the conversation goes on. In a pipe, where each line depends on those before it,
    the first error ends it.

    Args:
        folder: of saved conversations.

    Raises:
        BrokenPipeError: the reader of the answers is gone.
    """
    is_leaving, code = False, 0
    while True:
        try:
            line = await reader.read()
        except KeyboardInterrupt:
            if is_leaving:
                return code
            is_leaving = True
            say("Ctrl-C again, or Ctrl-D, leaves", style="yellow")
            continue
        except EOFError:
            return code
        except (ValueError, OSError) as error:
            say_error(error)
            return _BAD
        is_leaving = False
        try:
            if await _take(line, session, answers, folder, ends_with_signal=not reader.is_terminal):
                return code
        except BackendGoneError as error:
            say_error(error)
            code = _GONE  # the conversation can still be saved
        except BrokenPipeError:
            raise
        except (ValueError, OSError, AnswerError) as error:
            say_error(error)
            if not reader.is_terminal:
                return _BAD
        if code and not reader.is_terminal:
            return code


async def _take(line: str, session: Session, answers: Answers, folder: Path, *, ends_with_signal: bool) -> bool:
    """Take one line; return whether the conversation ends with it."""
    if not line.strip():
        return False
    if line.startswith("/") and not line.startswith("//"):
        done = run_command(line, session, folder)
        if done.text:
            say(done.text)
        if done.retries:
            await _answer(session.retry(answers.show), session, answers, ends_with_signal=ends_with_signal)
        return done.quits
    question = line[1:] if line.startswith("//") else line
    await _answer(session.ask(question, answers.show), session, answers, ends_with_signal=ends_with_signal)
    return False


async def _answer(
    asked: Coroutine[Any, Any, str], session: Session, answers: Answers, *, ends_with_signal: bool
) -> None:
    """Wait for an answer, which Ctrl-C ends alone in a terminal."""
    task = asyncio.create_task(asked)
    with _interrupting(task, is_off=ends_with_signal):
        try:
            finish = await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            finish = INTERRUPTED  # before it had begun
    answers.show("\n")
    for line in session.take_sources():
        say(line)
    if finish == INTERRUPTED:
        say("the answer was ended by Ctrl-C", style="yellow")
    elif finish in _ENDS and session.mode.name != "continue":
        say(_ENDS[finish].format(session.sampling.max_new_tokens), style="yellow")


@contextmanager
def _interrupting(task: "asyncio.Task[str]", *, is_off: bool) -> Iterator[None]:
    """Have Ctrl-C cancel a task."""
    if is_off:
        yield
        return
    loop = asyncio.get_running_loop()
    former = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, former)
