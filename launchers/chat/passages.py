"""`trimaran generate --mode translate|summarize`: texts of any length, each for itself, in passages. No torch."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimaran.launchers.chat.asking import Answer, Asker, Show
from trimaran.launchers.chat.start import stop_tokens_of, stopping
from trimaran.launchers.chat.terminal import Answers
from trimaran.launchers.terminal import say
from trimaran.models.fields import counted
from trimaran.runtime.infer.batching.messages import Backend
from trimaran.runtime.infer.modes import Mode, prompt_in_mode
from trimaran.runtime.infer.prompts import Prompt, RunText
from trimaran.runtime.infer.sampling_params import SamplingParams


@dataclass(frozen=True)
class Texts:
    """What is asked for on the command line.

    Args:
        run: its folder.
        stops, stop_tokens: strings and names of tokens that end an answer.
        as_json: whether each result is a line of JSON; otherwise there is one text, whose result is streamed.
    """

    run: Path
    inputs: Sequence[Prompt]
    mode: Mode
    sampling: SamplingParams
    stops: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    system: str | None
    as_json: bool


async def put(asked: Texts, start: Callable[[], AbstractAsyncContextManager[Backend]]) -> None:
    """Print the translation or summary of each text.

    Args:
        start: starts the ranks, which end with the context.

    Raises:
        ValueError: the model can't do what is asked; a sentence.
        Stopped: a signal came.
    """
    text = RunText.open(asked.run)
    stops = (*stop_tokens_of(text), *map(text.id_of, asked.stop_tokens))
    asked = replace(asked, sampling=replace(asked.sampling, stop_tokens=stops, context="stop"))
    prompt_in_mode(asked.mode, "", has_template=text.template is not None, system=asked.system)
    for number, each in enumerate(asked.inputs, 1):
        if each.text is None or each.messages is not None:
            raise ValueError(f"prompt {number} is a conversation, and --mode {asked.mode.name} takes a text")
    with stopping():
        async with start() as backend:
            asker, answers, found = Asker(backend, text), Answers(), list[Answer]()
            if asked.as_json:
                await _print_records(asked, asker, answers, found)
            else:
                rest = await _put_one(asked, asker, asked.inputs[0].text or "", found, answers.show)
                answers.show(f"{rest}\n")
            cut = sum(each.finish == "length" for each in found)
            if cut:
                of, most = counted(len(found), "answer"), asked.sampling.max_new_tokens
                say(f"{cut} of {of} ended at --max-new-tokens {most}")


async def _put_one(asked: Texts, asker: Asker, text: str, found: list[Answer], show: Show) -> str:
    """Show the result of one text as it comes; return it where it could not be shown before its end, else ""."""
    shown: list[str] = []

    def take(piece: str) -> None:
        shown.append(piece)
        show(piece)

    whole = await asker.ask_in_passages(found, asked.mode, text, asked.sampling, asked.stops, asked.system, take, say)
    return "" if shown else whole


async def _print_records(asked: Texts, asker: Asker, answers: Answers, found: list[Answer]) -> None:
    """Print a record for each text, in order; as many are put at the same time as the ranks have places for."""
    places = asyncio.Semaphore(max(1, asker.backend.slots))

    async def record(number: int, each: Prompt) -> dict[str, Any]:
        own: list[Answer] = []
        shown: list[str] = []
        async with places:
            rest = await _put_one(asked, asker, each.text or "", own, shown.append)
        found.extend(own)
        ends = [answer.finish for answer in own]
        named = {} if each.name is None else {"id": each.name}
        return {
            "index": number,
            **named,
            "prompt": each.text,
            "text": "".join(shown) + rest,
            "finish": next((end for end in ends if end != "stop_token"), "stop_token"),
            "new_tokens": sum(len(answer.drawn) for answer in own),
            "passages": len(own),
        }

    try:
        async with asyncio.TaskGroup() as tasks:
            records = [tasks.create_task(record(number, each)) for number, each in enumerate(asked.inputs)]
            for task in records:
                answers.show_json(await task)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
