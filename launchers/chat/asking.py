"""Questions to a model's ranks, as texts that arrive piece by piece, with what each answer took. No torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

from trimaran.runtime.infer.batching.messages import Backend, Event, Failed, Finished, NewToken, PromptScores, Request
from trimaran.runtime.infer.modes import Mode, passage_test, prompt_in_mode, rounds
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.infer.text import TextStream

Show = Callable[[str], None]


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
    """

    def __init__(self, backend: Backend, text: RunText) -> None:
        self.backend, self.text = backend, text
        self._ids = count()

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
    ) -> str:
        """Return the translation or the summary of a text of any length; show its pieces in their order.

        Args:
            answers: gets the answer of every passage.
            note: called with a sentence where the text goes in passages.

        Raises:
            ValueError: the context has no room for any passage, or the model is of the wrong kind (ChatError).
        """
        has_template = self.text.template is not None
        stops = (*stops, *mode.stop_strings(has_template=has_template))

        def encode(passage: str) -> list[int]:
            return self.text.encode(prompt_in_mode(mode, passage, has_template=has_template, system=system))

        parts = rounds(mode, text, passage_test(mode, encode, self.backend.context, sampling.max_new_tokens, self.text))
        given: Sequence[str] | None = None
        while True:
            try:
                each = parts.send(given)  # type: ignore[arg-type]  # None begins
            except StopIteration as ended:
                return str(ended.value)
            if each.note:
                note(each.note)
            prompts = [encode(passage) for passage in each.passages]
            found = [Answer(len(tokens)) for tokens in prompts]
            answers += found
            shows = InOrder(show, each.ends) if each.is_last else None
            await self._ask_all(found, prompts, sampling, stops, shows)
            given = [answer.text for answer in found]

    async def _ask_all(
        self,
        answers: Sequence[Answer],
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        stops: Sequence[str],
        shown: "InOrder | None",
    ) -> None:
        """Ask as many prompts at the same time as the ranks have places for, in their order."""
        places = asyncio.Semaphore(max(1, self.backend.slots))

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
