"""Questions to a model's ranks, as texts that arrive piece by piece, with what each answer took. No torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar, cast

from trimaran.runtime.infer.batching.messages import Backend, Event, Failed, Finished, NewToken, PromptScores, Request
from trimaran.runtime.infer.modes import Mode, Round, passage_test, prompt_in_mode, rounds
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.infer.text import TextStream

Show = Callable[[str], None]
Given = TypeVar("Given")
Made = TypeVar("Made")


class AnswerError(RuntimeError):
    """The ranks can't answer this prompt; the message is a sentence."""


@dataclass
class Answer:
    """An answer as it arrives.

    Args:
        finish: why it ended, None while it hasn't: the end of `Finished`, or "stop_string".
        cached: tokens of the prompt that were not computed again.
        first_token_s, last_token_s: seconds from the question to the first and the last token; None before the first.
    """

    prompt_tokens: int
    text: str = ""
    drawn: list[int] = field(default_factory=list)
    finish: str | None = None
    cached: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is none."""
        if self.first_token_s is None or self.last_token_s is None or len(self.drawn) < 2:
            return None
        return (len(self.drawn) - 1) / max(self.last_token_s - self.first_token_s, 1e-9)


class Asker:
    """Asks a model whatever its layout.

    Args:
        text: how it reads and writes text.
        first_id: of its requests, where others ask the same backend.
        thread: encodes long texts, for a loop that has others to answer meanwhile; None for the loop itself.
        encoding: as `text`, with a tokenizer that the thread alone uses.
    """

    def __init__(
        self,
        backend: Backend,
        text: RunText,
        *,
        first_id: int = 0,
        thread: Executor | None = None,
        encoding: RunText | None = None,
    ) -> None:
        self.backend, self.text = backend, text
        self._ids = count(first_id)
        self._thread, self._encoding = thread, encoding or text

    async def ask(
        self,
        answer: Answer,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stops: Sequence[str],
        sample: int,
        show: Show,
    ) -> None:
        """Fill in the answer to a prompt as it arrives, and show each piece of its text.

        Where the task is cancelled, the request is too, and the answer has what arrived.

        Raises:
            AnswerError: the ranks can't answer it.
            BackendGoneError: they have ended.
        """
        request = Request(next(self._ids), tuple(prompt), sampling, sample)
        stream, begun = TextStream(self.text.tokenizer, prompt, stops), time.monotonic()

        def settle() -> None:
            new = stream.text[len(answer.text) :]
            answer.text = stream.text
            if new:
                show(new)

        events = cast("Any", self.backend.submit(request))  # an asynchronous generator: it can be closed
        async with aclosing(events):
            try:
                async for event in cast("AsyncIterator[Event]", events):
                    if isinstance(event, PromptScores):
                        answer.cached = event.cached
                    elif isinstance(event, NewToken) and event.token not in sampling.stop_tokens:
                        answer.last_token_s = time.monotonic() - begun
                        answer.first_token_s = answer.first_token_s or answer.last_token_s
                        answer.drawn.append(event.token)
                        if stream.add(event.token):
                            answer.finish = "stop_string"
                            break
                        settle()
                    elif isinstance(event, Failed):
                        raise AnswerError(event.message)
                    elif isinstance(event, Finished):
                        answer.finish = event.finish
            finally:
                stream.finish()
                settle()

    async def ask_in_passages(
        self,
        answers: list[Answer],
        mode: Mode,
        text: str,
        sampling: SamplingParams,
        stops: Sequence[str],
        system: str | None,
        show: Show,
        note: Callable[[str], None],
        *,
        at_once: int | None = None,
    ) -> str:
        """Return the translation or the summary of a text of any length; show its pieces in their order.

        Args:
            answers: gets the answer of every passage.
            note: called with a sentence where the text goes in passages.
            at_once: passages at the same time; None for as many as the ranks have places.

        Raises:
            ValueError: the context has no room for any passage, or the model is of the wrong kind (ChatError).
        """
        has_template = self.text.template is not None
        stops = (*stops, *mode.stop_strings(has_template=has_template))

        def encode(passage: str) -> list[int]:
            return self._encoding.encode(prompt_in_mode(mode, passage, has_template=has_template, system=system))

        fits = passage_test(mode, encode, self.backend.context, sampling.max_new_tokens, self._encoding)
        parts = rounds(mode, text, fits)

        def step(given: Sequence[str] | None) -> tuple[Round, list[list[int]]] | str:
            try:
                each = parts.send(given)  # type: ignore[arg-type]  # None begins
            except StopIteration as ended:
                return str(ended.value)
            return each, [encode(passage) for passage in each.passages]

        given: Sequence[str] | None = None
        while not isinstance(made := await self._apart(step, given), str):
            each, prompts = made
            if each.note:
                note(each.note)
            found = [Answer(len(tokens)) for tokens in prompts]
            answers += found
            shows = InOrder(show, each.ends) if each.is_last else None
            await self._ask_all(found, prompts, sampling, stops, shows, at_once or self.backend.slots)
            given = [answer.text for answer in found]
        return made

    async def _apart(self, function: Callable[[Given], Made], given: Given) -> Made:
        """Return what a function gives, called in the thread if there is one."""
        if self._thread is None:
            return function(given)
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, given)

    async def _ask_all(
        self,
        answers: Sequence[Answer],
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        stops: Sequence[str],
        shown: "InOrder | None",
        at_once: int,
    ) -> None:
        """Ask so many prompts at the same time, in their order."""
        places = asyncio.Semaphore(max(1, at_once))

        async def ask(number: int) -> None:
            async with places:
                show = shown.of(number) if shown else _ignore
                await self.ask(answers[number], prompts[number], sampling, stops, number, show)
            if shown:
                shown.end(number)

        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(prompts)):
                    tasks.create_task(ask(number))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None


def _ignore(text: str) -> None:
    """Show nothing."""


class InOrder:
    """Shows texts that arrive at the same time one after the other.

    Args:
        ends: what follows each; the last one's is left out.
    """

    def __init__(self, show: Show, ends: Sequence[str]) -> None:
        self._show, self._ends = show, [*ends[:-1], ""]
        self._waiting = [""] * len(ends)
        self._is_ended = [False] * len(ends)
        self._current, self._is_begun = 0, False

    def of(self, number: int) -> Show:
        """Return what takes the pieces of a text."""

        def take(piece: str) -> None:
            self._waiting[number] += piece
            self._pass_on()

        return take

    def end(self, number: int) -> None:
        """Take the end of a text."""
        self._is_ended[number] = True
        self._pass_on()

    def _pass_on(self) -> None:
        while self._current < len(self._ends):
            number = self._current
            waiting = self._waiting[number]
            # White space around an answer is not its own; what may be its end waits.
            new = waiting.rstrip() if self._is_begun else waiting.strip()
            if new:
                self._show(new)
                self._is_begun, self._waiting[number] = True, waiting[len(waiting.rstrip()) :]
            if not self._is_ended[number]:
                return
            self._show(self._ends[number])
            self._current, self._is_begun = self._current + 1, False
