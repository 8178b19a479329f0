"""A twin's library as its talkers use it: what is asked of the model for a question, and what its answer rests on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.infer.prompts import Prompt, RunText
from trimaran.runtime.twin.build import INDEX
from trimaran.runtime.twin.passages import Passage, read_passages
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.retrieval.citations import Checked, check_citations
from trimaran.runtime.twin.retrieval.grounding import grounded_messages
from trimaran.runtime.twin.retrieval.index import Index
from trimaran.runtime.twin.retrieval.phrases import language_of_question, phrases_of

FOUND: Final = 3
"""Passages that a prompt is given."""
_TEMPLATE_TOKENS: Final = 64  # that a chat template adds


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


class Library:
    """The texts of a twin, opened.

    Attributes:
        record: what the twin was made of.
        passages: all of them, held-out ones too.
    """

    def __init__(self, record: TwinRecord, passages: Sequence[Passage], index: Index) -> None:
        self.record, self.passages, self.index = record, tuple(passages), index

    @classmethod
    def open(cls, run: Path) -> "Library":
        """Return the library of a run folder.

        Raises:
            DataError: it holds no twin, or a file of it is damaged.
        """
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        folder = run / TWIN
        record = TwinRecord.read(folder)
        passages = read_passages(folder)
        return cls(record, passages, Index.load(folder / INDEX, passages))

    def ask(self, question: str, text: RunText, context: int, max_new_tokens: int, *, retrieval: bool = True) -> Asked:
        """Return what the model is asked.

        A model without a chat template continues the question, and no passage enters its prompt.

        Args:
            context: most tokens of a prompt and its answer.
            retrieval: whether passages are looked for; without, the weights alone answer.

        Raises:
            ValueError: the question leaves no room for a passage.
        """
        if text.template is None:
            return Asked(Prompt(question))
        own = [{"role": "system", "content": self.record.system}, {"role": "user", "content": question}]
        if not retrieval:
            return Asked(Prompt(question, tuple(own)))
        found = [each.passage for each in self.index.search(question, FOUND)]
        if not found:
            language = language_of_question(question, self.record.language)
            return Asked(None, silence=phrases_of(language).silent)
        grounding = grounded_messages(
            question,
            found,
            texts=self.record.language,
            count_tokens=lambda part: len(text.tokenizer.encode(part)),
            budget_tokens=context - max_new_tokens - _TEMPLATE_TOKENS,
            system=self.record.system,
        )
        return Asked(Prompt(question, tuple(grounding.messages)), grounding.passages)

    def check(self, answer: str, passages: Sequence[Passage]) -> Checked:
        """Return an answer with its citations and quotes held to the passages of its prompt."""
        return check_citations(answer, passages, self.index.terms)
