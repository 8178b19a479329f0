"""One conversation with a model: its history, its settings, and the questions that are put. No torch."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Final

from trimaran.launchers.chat.asking import Answer, Asker, Show
from trimaran.launchers.chat.grounded import check, ground, with_passages
from trimaran.runtime.infer.chat import MARKS
from trimaran.runtime.infer.dialogue import Dialogue, Exchange, Written, encoder_of, fit, written_after
from trimaran.runtime.infer.dialogue import Turn as FittedTurn
from trimaran.runtime.infer.modes import Mode, did_you_mean
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.retrieval.citations import CitationStream

SETTINGS: Final = tuple(each.name for each in fields(SamplingParams) if each.name not in ("stop_tokens", "context"))
"""Names that /set knows."""
INTERRUPTED: Final = "interrupted"
_SEEDS: Final = 2**63


@dataclass
class Turn:
    """One answer of a session and what it took: several answers where a text went in passages."""

    answers: list[Answer] = field(default_factory=list)


class Session:
    """A conversation with a model.

    Attributes:
        saved: the exchanges that a file has.

    Args:
        stops: strings that end an answer.
        note: called with sentences for the user.
        twin: whose library answers are held to; None for the model alone.
        streams: whether a twin's answer is shown before it has been held to its passages.
    """

    def __init__(
        self,
        asker: Asker,
        mode: Mode,
        sampling: SamplingParams,
        stops: Sequence[str],
        system: str | None,
        note: Callable[[str], None],
        twin: Twin | None = None,
        *,
        streams: bool = True,
    ) -> None:
        self.asker, self.mode, self.sampling = asker, mode, sampling
        self.dialogue, self.identity = Dialogue(system), uuid.uuid4().hex
        self.turns: list[Turn] = []
        self.saved = self.dialogue.exchanges
        self._stops, self._note, self._retries = tuple(stops), note, 0
        self._is_plain = mode.name == "continue"
        self._twin, self._streams = twin, streams
        self._sources: list[str] = []
        if not mode.is_by_passages:
            self._encode = encoder_of(asker.text, is_plain=self._is_plain)  # a missing template is told at the start

    async def ask(self, question: str, show: Show) -> str:
        """Put a question and show the answer as it comes; return why it ended.

        Where the task is cancelled, the answer is kept as far as it got, and the end is INTERRUPTED. An answer that
        was cancelled before it began, or that failed, leaves the conversation as it was.

        Raises:
            TooLongError: the context has no room for the question.
            AnswerError: the ranks can't answer it.
            BackendGoneError: they have ended.
        """
        self._retries = 0
        return await self._ask(self.dialogue, question, show)

    async def retry(self, show: Show) -> str:
        """Put the last question again, for another answer in the place of the last; as `ask` otherwise."""
        before = self.dialogue.undone()
        self._retries += 1
        if self.sampling.is_greedy:
            self._note("at temperature 0 the same question has the same answer; /set temperature 0.8 draws others")
        return await self._ask(before, self.dialogue.exchanges[-1].question, show)

    async def _ask(self, before: Dialogue, question: str, show: Show) -> str:
        turn = Turn()
        self.turns.append(turn)
        try:
            if self.mode.is_by_passages:
                after, finish = await self._by_passages(turn, before, question, show)
            elif self._twin is not None:
                after, finish = await self._grounded(self._twin, turn, before, question, show)
            else:
                after, finish = await self._in_dialogue(turn, before, question, show)
        except BaseException:
            self.turns.remove(turn)
            raise
        if finish != INTERRUPTED or after.exchanges[-1].answer:
            self.dialogue = after
        return finish

    async def _in_dialogue(self, turn: Turn, before: Dialogue, question: str, show: Show) -> tuple[Dialogue, str]:
        backend = self.asker.backend
        asked = fit(before, question, self._encode, backend.context, self.sampling.max_new_tokens)
        if asked.note:
            self._note(asked.note)
        answer = Answer(len(asked.tokens))
        turn.answers.append(answer)
        try:
            await self.asker.ask(answer, asked.tokens, self.sampling, self._stops, self._retries, show)
        except asyncio.CancelledError:
            answer.finish = INTERRUPTED
        told = MARKS.sub("\ufffd", answer.text)
        return asked.dialogue.answered(
            Exchange(question, told, self._written(asked, answer, told))
        ), answer.finish or ""

    async def _grounded(
        self, twin: Twin, turn: Turn, before: Dialogue, question: str, show: Show
    ) -> tuple[Dialogue, str]:
        backend, text = self.asker.backend, self.asker.text
        room = backend.context - min(self.sampling.max_new_tokens, backend.context // 4)
        asked_before = [each.question for each in before.exchanges]
        encode = text.tokenizer.encode
        grounded = ground(twin, question, before.system, lambda part: len(encode(part)), room, asked_before)
        if grounded.silence:
            show(grounded.silence)
            return before.answered(Exchange(question, grounded.silence)), ""
        told, put, place = with_passages(before, question, grounded)
        asked = fit(told, put, self._encode, backend.context, backend.context - room)
        if asked.dialogue.first > place:  # the turn with the passages has left the context
            told, put = replace(before, system=grounded.system), f"{grounded.question}\n\n{question}"
            asked = fit(told, put, self._encode, backend.context, backend.context - room)
        if asked.note:
            self._note(asked.note)
        answer = Answer(len(asked.tokens))
        turn.answers.append(answer)
        cited = CitationStream(len(grounded.passages))
        take = (lambda piece: show(cited.add(piece))) if self._streams else _ignore
        try:
            await self.asker.ask(answer, asked.tokens, self.sampling, self._stops, self._retries, take)
        except asyncio.CancelledError:
            answer.finish = INTERRUPTED
        checked, lines = check(twin, MARKS.sub("\ufffd", answer.text), question, grounded.passages)
        show(cited.finish() if self._streams else checked)
        self._sources = lines
        kept = replace(before, first=asked.dialogue.first)
        exchange = Exchange(question, checked, self._written(asked, answer, checked))
        return kept.answered(exchange), answer.finish or ""

    def _written(self, asked: FittedTurn, answer: Answer, told: str) -> Written | None:
        """Return what the model has after an answer that is told; None where its tokens are not all of that.

        A stop string cuts the text off from its last tokens, and marks of `marked_message` can't be told again.
        """
        if answer.finish == "stop_string" or told != answer.text:
            return None
        return written_after(asked, told, tuple(answer.drawn), self.asker.text, is_plain=self._is_plain)

    def take_sources(self) -> list[str]:
        """Return a line for each source of the last answer and each fault in it, once."""
        lines, self._sources = self._sources, []
        return lines

    async def _by_passages(self, turn: Turn, before: Dialogue, question: str, show: Show) -> tuple[Dialogue, str]:
        shown: list[str] = []

        def take(piece: str) -> None:
            shown.append(piece)
            show(piece)

        finish = INTERRUPTED
        # The numbers of samples tell passages apart.
        sampling = replace(self.sampling, seed=(self.sampling.seed + self._retries) % _SEEDS)
        try:
            found = await self.asker.ask_in_passages(
                turn.answers, self.mode, question, sampling, self._stops, before.system, take, self._note
            )
            if not shown:
                show(found)
            finish = next((each.finish for each in turn.answers if each.finish != "stop_token"), "") or ""
        except asyncio.CancelledError:
            found = "".join(shown)
        return before.answered(Exchange(question, found)), finish

    def set(self, name: str, value: str) -> None:
        """Change a setting of sampling; ValueError for an unknown one (the nearest is told) or a wrong value."""
        name = name.replace("-", "_")
        if name not in SETTINGS:
            known = f"there is no setting {name} among {', '.join(SETTINGS)}"
            raise ValueError(known + did_you_mean(name, SETTINGS))
        kind = type(getattr(self.sampling, name))
        try:
            number = kind(value)
        except ValueError:
            raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}; got {value}") from None
        if name == "max_new_tokens" and number < 1:
            raise ValueError(f"max_new_tokens ({number}) must be at least 1")
        self.sampling = replace(self.sampling, **{name: number})


def _ignore(text: str) -> None:
    """Show nothing."""
