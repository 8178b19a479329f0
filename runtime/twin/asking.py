"""A twin that is asked: what a question becomes for its model, with its library or by the weights alone."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.infer.prompts import Prompt, RunText
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.record import RECORD, TWIN, TwinRecord
from trimaran.runtime.twin.retrieval.grounding import Grounding
from trimaran.runtime.twin.retrieval.library import Library

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


@dataclass(frozen=True)
class Twin:
    """A twin. For several threads, which its library lets in one at a time.

    Args:
        system: what it is told of itself.
        about: whom it imitates and from which works.
    """

    library: Library
    system: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, run: Path) -> "Twin | None":
        """Return the twin of a run folder; None where it holds none.

        Raises:
            DataError: its files are damaged, or a package for them is missing.
        """
        return Twin.open(run) if (run / TWIN / RECORD).exists() else None

    @classmethod
    def open(cls, run: Path) -> "Twin":
        """Return the twin of a run folder.

        Raises:
            DataError: it holds none, its files are damaged, or a package for them is missing.
        """
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        record = TwinRecord.read(run / TWIN)
        works = [each.title for each in record.works]
        about = {"author": record.author, "character": record.character, "works": works}
        return cls(Library.open(run / TWIN), record.system, about)

    def ground(
        self,
        question: str,
        told: Sequence[str],
        count_tokens: Callable[[str], int],
        budget_tokens: int,
        before: Sequence[str],
    ) -> Grounding | str:
        """Return the prompt for a question, or the whole answer where the texts are silent on it; see Library.ground.

        Args:
            told: what a user says of the twin, beside what it is told of itself.
            before: the questions before it, the oldest first.
        """
        system = "\n\n".join(each for each in (self.system, *told) if each)
        return self.library.ground(
            question, count_tokens=count_tokens, budget_tokens=budget_tokens, system=system, before=before
        )

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
            before: what was said before, the oldest first.
            retrieval: whether passages are looked for; without, the weights alone answer.

        Raises:
            ValueError: the question leaves no room for a passage.
        """
        if text.template is None:
            return Asked(Prompt(question))
        said = tuple(message for turn in before for message in _messages(*turn))
        if not retrieval:
            own = {"role": "system", "content": self.system}
            return Asked(Prompt(question, (own, *said, {"role": "user", "content": question})))

        def count_tokens(part: str) -> int:
            return len(text.tokenizer.encode(part))

        spent = sum(map(count_tokens, (question, *(each["content"] for each in said))))
        budget = context - max_new_tokens - spent - _TEMPLATE_TOKENS * (1 + len(before))
        found = self.ground(question, (), count_tokens, budget, [asked for asked, _ in before])
        if isinstance(found, str):
            return Asked(None, silence=found)
        system, asked = found.messages
        turns = [*said, {"role": "user", "content": question}]
        turns[-1 - 2 * found.back] = asked
        return Asked(Prompt(question, (system, *turns)), found.passages)


def _messages(question: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}
