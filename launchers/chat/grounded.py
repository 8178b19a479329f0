"""A twin in a conversation: its questions are put with passages of its library, and its answers are held to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from trimaran.runtime.infer.dialogue import Dialogue
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.citations import Checked

_MARKUP_TOKENS: Final = 32  # that a template may write around two messages
_SHARE: Final = 0.75  # of the room of a prompt, for passages, question and system message; turns before have the rest


@dataclass(frozen=True)
class Grounded:
    """A question with what the texts say, or their silence.

    Args:
        system, question: what the model is told in the place of the conversation's own system message, and of the
            question that is `back` before the last: 0 for the last itself.
        silence: the whole answer where the texts say nothing, else "".
    """

    system: str
    question: str
    passages: tuple[Passage, ...] = ()
    silence: str = ""
    back: int = 0


def ground(
    twin: Twin,
    question: str,
    system: str | None,
    count_tokens: Callable[[str], int],
    room: int,
    before: Sequence[str] = (),
) -> Grounded:
    """Return a question with passages.

    Args:
        before: the questions before it, the oldest first.
        system: what the user has told beside.
        room: of a prompt, in tokens.

    Raises:
        ValueError: it has no room for a passage.
    """
    found = twin.ground(question, (system or "",), count_tokens, int(_SHARE * room) - _MARKUP_TOKENS, before)
    if isinstance(found, str):
        return Grounded("", question, (), found)
    first, asked = found.messages
    return Grounded(first["content"], asked["content"], found.passages, back=found.back)


def with_passages(before: Dialogue, question: str, grounded: Grounded) -> tuple[Dialogue, str, int]:
    """Return the conversation and the question as the model is told them, and the number of the passages' turn."""
    told, place = replace(before, system=grounded.system), len(before.exchanges) - grounded.back
    if not grounded.back:
        return told, grounded.question, place
    own = replace(told.exchanges[place], question=grounded.question)
    return replace(told, exchanges=(*told.exchanges[:place], own, *told.exchanges[place + 1 :])), question, place


def check(twin: Twin, answer: str, asked: str, passages: tuple[Passage, ...]) -> tuple[str, list[str]]:
    """Return an answer as it is held to its passages, and a line for each source and each fault."""
    found = twin.library.check(answer, passages)
    return twin.library.mark(found, asked), [*_sources(found), *_faults(found)]


def _sources(found: Checked) -> list[str]:
    first = {each.number: each for each in reversed(found.citations)}
    return [
        f"[{number}] {', '.join(part for part in (each.title, each.chapter) if part)}, lines {each.first_line} to "
        f"{each.last_line} ({each.file})" + (", found by the words that both have" if each.is_attached else "")
        for number, each in sorted(first.items())
    ]


def _faults(found: Checked) -> list[str]:
    invalid = [f"[{number}] is no passage of the prompt, and is taken out of the answer" for number in found.invalid]
    quotes = [f"no passage has these words as they are: {each.text}" for each in found.quotes if not each.is_verbatim]
    return [*invalid, *quotes]
