"""A training example: turns, and the passages that the author's words in them are of."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from trimaran.runtime.files import write_text
from trimaran.runtime.twin.persona.paragraphs import Words

Kind = Literal["dialogue", "thought", "question", "continuation", "text"]
KINDS: Final = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Example:
    """What a model learns from: a question or the words said before, and the author's own words as the answer.

    Args:
        answer: verbatim words.
        asked: the user's turn; None for a text that is only continued.
        question: the author's words in the user's turn: all of it, or those around which a question is made.
    """

    kind: Kind
    answer: Words
    asked: str | None = None
    question: Words | None = None

    def as_json(self, system: str) -> dict[str, Any]:
        """Return the record of a file: `messages` or `text`, and `sources`, the passages with their characters.

        Args:
            system: the system message, which is the same for all of a twin.
        """
        sources: dict[str, Any] = {"assistant": self.answer.as_json()}
        if self.question is not None:
            sources["user"] = self.question.as_json()
        if self.asked is None:
            return {"text": self.answer.text, "kind": self.kind, "sources": sources}
        turns = (("system", system), ("user", self.asked), ("assistant", self.answer.text))
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"messages": messages, "kind": self.kind, "sources": sources}


@dataclass
class Persona:
    """The examples of a twin, and the counts of what was found and of what gives no example.

    Args:
        language: of the questions that are made.
    """

    language: str
    examples: list[Example] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str, number: int = 1) -> None:
        """Count something by its reason."""
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number


def write_examples(folder: Path, examples: Iterable[Example], system: str) -> dict[str, int]:
    """Write `KIND.jsonl` for each kind that has examples, and return how many each has.

    Raises:
        OSError: a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for example in examples:
        lines[example.kind].append(json.dumps(example.as_json(system), ensure_ascii=False))
    for kind, found in lines.items():
        path = folder / f"{kind}.jsonl"
        if found:
            write_text(path, "\n".join(found) + "\n")
        else:
            path.unlink(missing_ok=True)
    return {kind: len(found) for kind, found in lines.items() if found}
