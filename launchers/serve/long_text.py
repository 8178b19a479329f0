"""Texts beyond the context, where a server translates or summarizes: they go in passages, as chat and generate do."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trimaran.launchers.chat.asking import Answer, AnswerError, Asker
from trimaran.launchers.serve.answers import LongText, Piece, Usage
from trimaran.launchers.serve.errors import ApiError
from trimaran.launchers.serve.http.limits import Gate
from trimaran.launchers.serve.http.metrics import Metrics

MOST_AT_ONCE: Final = 4


def places_of(gate: Gate) -> int:
    """Return how many passages one request may have written at the same time: places that nobody else uses, few."""
    return max(1, min(MOST_AT_ONCE, gate.slots - gate.taken))


@dataclass
class Passages:
    """The passages of one text being written.

    Args:
        at_once: how many at the same time.
    """

    asker: Asker
    text: LongText
    at_once: int
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    async def run(self, emit: Callable[[int, Piece], Awaitable[None]]) -> None:
        """Call `emit` with (0, piece) for all that is new, in the order of the text, until all of it is written.

        Raises:
            ApiError: the ranks can't answer a passage.
            BackendGoneError: they have ended.
        """
        told: asyncio.Queue[str | None] = asyncio.Queue()
        work = asyncio.create_task(self._ask(told))
        try:
            while (piece := await told.get()) is not None:
                await emit(0, Piece(piece))
            await work
        except AnswerError as error:
            raise ApiError(500, str(error)) from None
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        is_cut = any(each.finish == "length" for each in self.answers)
        await emit(0, Piece("", (), "length" if is_cut else "stop"))

    async def _ask(self, told: "asyncio.Queue[str | None]") -> None:
        """Put the pieces of the answer into a queue, and None after the last."""
        asked, shown = self.text, list[str]()

        def show(piece: str) -> None:
            shown.append(piece)
            told.put_nowait(piece)

        try:
            whole = await self.asker.ask_in_passages(
                self.answers, asked.mode, asked.text, asked.sampling, asked.stops, asked.system, show,
                self.notes.append, at_once=self.at_once,
            )  # fmt: skip
            if not shown:
                told.put_nowait(whole)
        finally:
            told.put_nowait(None)

    def record(self) -> dict[str, Any]:
        """Return what the answer tells beside its text: how many passages, and what was done with them."""
        alone = ["the context has no room for the messages before the text"] if self.text.is_alone else []
        return {"passages": len(self.answers), "note": "; ".join([*alone, *self.notes])}

    def usage(self) -> Usage:
        """Return the numbers of tokens so far, of all passages."""
        return Usage(*(sum(each) for each in zip(*self._tokens(), strict=True)))

    def count(self, metrics: Metrics) -> None:
        """Add what was written to the server's numbers."""
        usage = self.usage()
        metrics.prompt_tokens += usage.prompt
        metrics.cached_tokens += usage.cached
        metrics.new_tokens += usage.new

    def _tokens(self) -> Sequence[tuple[int, int, int]]:
        return [(0, 0, 0), *((each.prompt_tokens, each.cached, len(each.drawn)) for each in self.answers)]
