"""The prompt of a question with the passages to answer from, within a budget of tokens."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.phrases import language_of_question, phrases_of

_END: Final = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|\n")
LEAST_WORDS: Final = 30
"""Of a passage that is cut to the budget; with fewer it stays out."""


@dataclass(frozen=True, slots=True)
class Grounding:
    """A prompt and what it rests on.

    Args:
        messages: role and content: what the system says, and the user's passages and question.
        passages: those in the prompt; the first is [1].
        left_out: passages that were found and had no room.
        is_cut: whether the last passage in the prompt ends early, at a sentence or a line; citations and quotes are
            still held against all of it.
        back: how many questions before the last the passages stand; 0 for its own turn, which `messages` are of.
    """

    messages: tuple[dict[str, str], ...]
    passages: tuple[Passage, ...]
    left_out: int
    is_cut: bool
    back: int = 0


def grounded_messages(
    question: str,
    passages: Sequence[Passage],
    *,
    texts: str,
    count_tokens: Callable[[str], int],
    budget_tokens: int,
    system: str = "",
) -> Grounding:
    """Return the messages that ask a question over numbered passages, as many as fit, the best first.

    Args:
        passages: found for the question, the best first.
        texts: ISO 639-1 code of the texts' language; the instruction is in the question's where it is known.
        count_tokens: of a text; what a chat template adds is not in the budget.
        budget_tokens: the most of all messages' contents together.
        system: what the twin is told of itself, before the instruction; "" for nothing.

    Raises:
        ValueError: there is no passage (the texts are silent: `silent_answer`), or the budget has no room for the
            instruction, the question and LEAST_WORDS of one.
    """
    if not passages:
        raise ValueError("there is no passage to answer from; answer with silent_answer")
    words = phrases_of(language_of_question(question, texts))
    told = "\n\n".join(part for part in (system, words.instruction) if part)

    def messages(blocks: Sequence[str]) -> tuple[dict[str, str], ...]:
        asked = "\n\n".join([words.passages, *blocks, f"{words.question} {question}"])
        return {"role": "system", "content": told}, {"role": "user", "content": asked}

    def fits(blocks: Sequence[str]) -> bool:
        # Counted as a whole: tokens of parts do not add up where one ends in the middle of a token.
        return sum(count_tokens(each["content"]) for each in messages(blocks)) <= budget_tokens

    blocks = list[str]()
    for number, passage in enumerate(passages, 1):
        block = numbered(number, passage)
        if fits([*blocks, block]):
            blocks.append(block)
            continue
        cut = _cut(passage, lambda text: fits([*blocks, numbered(number, passage, text)]))  # noqa: B023
        if cut:
            blocks.append(numbered(number, passage, cut))
        elif not blocks:
            least = sum(count_tokens(each["content"]) for each in messages([]))
            raise ValueError(
                f"a budget of {budget_tokens:,} tokens has no room for a passage beside instruction and question"
                f" ({least:,} tokens); shorten the question or the system prompt, or use a model with a longer context"
            )
        return Grounding(messages(blocks), tuple(passages[: len(blocks)]), len(passages) - len(blocks), bool(cut))
    return Grounding(messages(blocks), tuple(passages), 0, False)


def numbered(number: int, passage: Passage, text: str = "") -> str:
    """Return a passage as a prompt shows it: number, title and chapter above its text, or above a part of it."""
    where = ", ".join(part for part in (passage.title, passage.chapter) if part)
    return f"[{number}] {where}\n{text or passage.text}"


def _cut(passage: Passage, fits: Callable[[str], bool]) -> str:
    """Return the longest beginning of a passage that ends with a sentence or line and fits; "" where it is short."""
    ends = [match.start() for match in _END.finditer(passage.text)]
    low, high = 0, len(ends)  # the beginnings [:ends[:low]] fit, those from high on do not
    while low < high:
        middle = (low + high) // 2
        if fits(passage.text[: ends[middle]]):
            low = middle + 1
        else:
            high = middle
    text = passage.text[: ends[low - 1]] if low else ""
    return text if len(text.split()) >= LEAST_WORDS else ""
