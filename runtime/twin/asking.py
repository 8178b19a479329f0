"""A twin that is asked: what a question becomes for its model, with its library or by the weights alone."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.infer.prompts import Prompt, RunText
from trimaran.runtime.twin.passages import Passage, read_passages
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.retrieval.index import Index
from trimaran.runtime.twin.retrieval.library import INDEX, Library

FOUND: Final = 3
"""Passages that a prompt is given."""
_TEMPLATE_TOKENS: Final = 64  # that a chat template adds to a turn
Turns = Sequence[tuple[str, str]]
"""Questions with their answers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a question becomes.

    Args:
        prompt: for the model; None where the texts are silent.
        passages: in the prompt, the first is [1]; none where it has none.
        silence: what the twin says where its texts are silent; "" where they are not.
    """

    prompt: Prompt | None
    passages: tuple[Passage, ...] = ()
    silence: str = ""


class Twin:
    """The folder of a twin, opened. Not for several threads at once.

    Attributes:
        record: what the twin was made of.
        passages: all of them, held-out ones too.
        library: over those that are not held out.
    """

    def __init__(self, record: TwinRecord, passages: Sequence[Passage], library: Library) -> None:
        self.record, self.passages, self.library = record, tuple(passages), library

    @classmethod
    def open(cls, run: Path) -> "Twin":
        """Return the twin of a run folder.

        Raises:
            DataError: it holds no twin, or a file of it is damaged.
        """
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        folder = run / TWIN
        record = TwinRecord.read(folder)
        passages = read_passages(folder)
        return cls(record, passages, Library(Index.load(folder / INDEX, passages)))

    def ask(
        self,
        question: str,
        text: RunText,
        context: int,
        max_new_tokens: int,
        before: Turns = (),
        *,
        retrieval: bool = True,
    ) -> Asked:
        """Return what the model is asked.

        A model without a chat template continues the question, and no passage enters its prompt.

        Args:
            context: most tokens of a prompt and its answer.
            before: what was said before, the oldest first; passages are looked for by the last of it too, for "Tell me
                more." finds none.
            retrieval: whether passages are looked for; without, the weights alone answer.

        Raises:
            ValueError: the question leaves no room for a passage.
        """
        if text.template is None:
            return Asked(Prompt(question))
        said = tuple(message for turn in before for message in _messages(*turn))
        if not retrieval:
            system = {"role": "system", "content": self.record.system}
            return Asked(Prompt(question, (system, *said, {"role": "user", "content": question})))
        spent = sum(len(text.tokenizer.encode(each["content"])) for each in said)
        looked_for = question if not before else f"{before[-1][0]} {question}"
        grounding = self.library.ground(
            looked_for,
            count_tokens=lambda part: len(text.tokenizer.encode(part)),
            budget_tokens=context - max_new_tokens - spent - _TEMPLATE_TOKENS * (1 + len(before)),
            system=self.record.system,
            k=FOUND,
        )
        if isinstance(grounding, str):
            return Asked(None, silence=grounding)
        system, asked = grounding.messages
        return Asked(Prompt(question, (system, *said, asked)), grounding.passages)


def _messages(question: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}
