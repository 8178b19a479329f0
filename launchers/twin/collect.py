"""What a model says and expects, gathered from its ranks: answers, continuations, bits a character."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from trimaran.launchers.chat.asking import Answer, AnswerError, Asker
from trimaran.runtime.evaluate.text import rolling_windows
from trimaran.runtime.evaluate.text_codes import TextCodes
from trimaran.runtime.infer.batching.messages import Backend, Failed, NewToken, PromptScores, Request
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.twin.asking import Turns, Twin
from trimaran.runtime.twin.retrieval.citations import Checked

T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """An answer of a twin, or of its base.

    Args:
        text: without citations of passages that were not given.
        checked: held to the passages of its prompt; None where it had none.
        invented: citations that were taken out.
        is_silent: whether the texts were silent, so that no model was asked.
    """

    question: str
    text: str
    checked: Checked | None = None
    invented: int = 0
    is_silent: bool = False


class Talker:
    """A model on its ranks, with the text that it reads and writes.

    Args:
        stops: ids that end an answer.
    """

    def __init__(self, backend: Backend, text: RunText) -> None:
        self.backend, self.text = backend, text
        self._asker, self._ids = Asker(backend, text), count(1 << 40)  # beside those of the asker
        self._stops = tuple(token for token in text.stop_tokens if token < text.tokenizer.vocab_size)

    async def answer(
        self,
        twin: Twin,
        questions: Sequence[str],
        sampling: SamplingParams,
        *,
        retrieval: bool,
        before: Sequence[Turns] | None = None,
    ) -> list[Said]:
        """Return an answer to each question.

        Args:
            before: what was said before each question; None for nothing.

        Raises:
            ValueError: a question leaves no room for a passage, or for an answer.
            AnswerError, BackendGoneError: the ranks can't answer, or have ended.
        """
        sampling = replace(sampling, stop_tokens=self._stops)

        async def ask(number: int) -> Said:
            question, context = questions[number], self.backend.context
            turns = before[number] if before is not None else ()
            asked = twin.ask(question, self.text, context, sampling.max_new_tokens, turns, retrieval=retrieval)
            if asked.prompt is None:
                return Said(question, asked.silence, is_silent=True)
            tokens = self.text.encode(asked.prompt)
            answer = Answer(len(tokens))
            await self._asker.ask(answer, tokens, sampling, (), number, lambda piece: None)
            checked = twin.library.check(answer.text.strip(), asked.passages)
            return Said(question, checked.text, checked if asked.passages else None, len(checked.invalid))

        return await self._all(ask, len(questions))

    async def go_on(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, so many tokens or up to the end of its text."""
        sampling = SamplingParams(tokens, temperature=0.0, stop_tokens=self._stops, context="stop")

        async def ask(number: int) -> list[int]:
            events = [each async for each in self._events(Request(next(self._ids), tuple(prompts[number]), sampling))]
            return [each.token for each in events if isinstance(each, NewToken)]

        return await self._all(ask, len(prompts))

    async def bits_per_character(self, texts: Sequence[str]) -> float:
        """Return the bits that a character of the texts costs the model: disjoint windows of its context.

        Raises:
            ValueError: the texts have no character.
        """
        characters = sum(map(len, texts))
        if not characters:
            raise ValueError("bits per character are of a text, and there is none")
        prefix = TextCodes.of(self.text).prefix
        windows = [
            window
            for text in texts
            for window in rolling_windows(self.text.tokenizer.encode(text), prefix, self.backend.context - 1)
        ]

        async def ask(number: int) -> float:
            window = windows[number]
            prompt = (*window.context, *window.continuation)
            request = Request(
                next(self._ids), prompt, SamplingParams(0, context="stop"), top_logprobs=0, scores_prompt=True
            )
            scores = [each async for each in self._events(request) if isinstance(each, PromptScores)]
            return -math.fsum(scores[0].logprobs[-len(window.continuation) :])

        return math.fsum(await self._all(ask, len(windows))) / math.log(2) / characters

    async def _events(self, request: Request) -> AsyncIterator[Any]:
        events = cast("Any", self.backend.submit(request))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Failed):
                    raise AnswerError(event.message)
                yield event

    async def _all(self, ask: Callable[[int], Awaitable[T]], total: int) -> list[T]:
        """Return what each call gives, as many at the same time as the ranks have places for."""
        places = asyncio.Semaphore(2 * max(1, self.backend.slots))

        async def one(number: int) -> T:
            async with places:
                return await ask(number)

        try:
            async with asyncio.TaskGroup() as tasks:
                made = [tasks.create_task(one(number)) for number in range(total)]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [each.result() for each in made]


Start = Callable[[Path], AbstractAsyncContextManager[Backend]]
"""Starts the ranks of a checkpoint, which end with the context.

Raises ValueError where it can't be cut as asked, BackendGoneError where they fail.
"""


@asynccontextmanager
async def talking(start: Start, checkpoint: Path, run: Path) -> AsyncIterator[Talker]:
    """Have a model talk, up to the end of the context.

    Args:
        run: whose tokenizer and template it has.
    """
    async with start(checkpoint) as backend:
        yield Talker(backend, RunText.open(run))
