"""A conversation from its options to its end: what is wrong is told before the ranks start. No torch."""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trimaran.launchers.chat.asking import Asker
from trimaran.launchers.chat.commands import COMMANDS, KEYS
from trimaran.launchers.chat.loop import converse
from trimaran.launchers.chat.session import Session
from trimaran.launchers.chat.terminal import Answers, PipeReader, Reader, TerminalReader
from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.terminal import say
from trimaran.models.fields import counted
from trimaran.runtime.infer.batching.messages import Backend
from trimaran.runtime.infer.modes import Mode, prompt_in_mode
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.twin.asking import Twin


@dataclass(frozen=True)
class Conversation:
    """What is asked for on the command line.

    Args:
        run: its folder.
        stops: strings that end an answer.
        folder: of saved conversations.
        retrieval: whether a twin answers from its library.
    """

    run: Path
    mode: Mode
    sampling: SamplingParams
    stops: tuple[str, ...]
    system: str | None
    folder: Path
    retrieval: bool = True


async def hold(asked: Conversation, start: Callable[[], AbstractAsyncContextManager[Backend]]) -> int:
    """Hold a conversation in the terminal or through pipes; return the exit code.

    Args:
        start: starts the ranks, which end with the context.

    Raises:
        ValueError: the model can't do what is asked; a sentence.
        Stopped: a signal came.
        BrokenPipeError: the reader of the answers is gone.
    """
    text = RunText.open(asked.run)
    is_plain = asked.mode.name == "continue"
    prompt_in_mode(asked.mode, "", has_template=text.template is not None, system=None if is_plain else asked.system)
    twin = Twin.find(asked.run) if asked.retrieval and asked.mode.name == "answer" else None
    if sys.stdin is None:
        raise ValueError("standard input is closed, and questions are read from it; give < /dev/null for none")
    reader: Reader = TerminalReader(list(COMMANDS)) if sys.stdin.isatty() else PipeReader(sys.stdin.fileno())
    with stopping():
        if reader.is_terminal:
            say(f"starting the model of {asked.run} ...")
        async with start() as backend:
            asker = Asker(backend, text)
            sampling = replace(asked.sampling, stop_tokens=stop_tokens_of(text))
            streams = reader.is_terminal
            session = Session(asker, asked.mode, sampling, asked.stops, asked.system, say, twin, streams=streams)
            if twin is not None:
                number = counted(len(twin.library.index.passages), "passage")
                say(f"answers come from the {number} of its library (--no-retrieval for the weights alone)")
            if reader.is_terminal:
                say(KEYS)
                say("/help names the commands.")
            return await converse(session, reader, Answers(), asked.folder)


def stop_tokens_of(text: RunText) -> tuple[int, ...]:
    """Return the ids that end an answer, of those that the tokenizer has, which the model has then too."""
    return tuple(token for token in text.stop_tokens if token < text.tokenizer.vocab_size)


@contextmanager
def stopping() -> Iterator[None]:
    """Have signals end the block like an error, so that the ranks end too.

    Raises Stopped where one came.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        came.append(number)
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    formers = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    except asyncio.CancelledError:
        if not came:
            raise
        raise Stopped(came[0]) from None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, formers[number])
