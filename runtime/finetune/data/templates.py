"""From the turns of a conversation to token ids, and which of them are learned.

An answer's tokens are those that the model would have to write: all that follows the prompt, rendered with the start of
an answer, up to the token that ends the turn. So the mask needs nothing of the template but that it only appends: the
prompt of every answer must be a prefix of the whole conversation. A template that rewrites history, such as one that
takes the thoughts out of earlier answers, would be learned on prompts that no conversation has, and is refused. Where
the template marks the assistant's words by {% generation %}, those are learned, and the token that ends their turn.
What a template writes before an answer must also end the prompt: else it is refused, for the model would learn to write
it, or get prompts without it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.examples import Document
from trimaran.runtime.finetune.data.records import Origin, Turn, Turns
from trimaran.runtime.infer.chat import (
    GENERATED,
    GENERATED_END,
    ChatError,
    ChatTemplate,
    encode_marked,
    marked_message,
)

_MARKS: Final = re.compile(r"\{%-?\s*generation\b")
_ANSWER, _OTHER_ANSWER = "1", "2"
LossOn = Literal["answers", "last_answer", "all"]


@dataclass
class ConversationEncoder:
    """Turns conversations into documents.

    Args:
        template: None for texts alone.
        adds_tokens: whether the tokenizer's own tokens, such as beginning-of-text, precede a text without a template.

    Attributes:
        ends: token id -> how many answers end with it.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    adds_tokens: bool = False
    ends: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pattern = None if self.template is None else self.template.control_pattern(self.tokenizer)
        names = [] if self.template is None else self.template.control_tokens(self.tokenizer)
        ids = [self.tokenizer.id_of(name) for name in (*names, self.tokenizer.eot_token)]
        self._control = frozenset(each for each in ids if each is not None)
        self._marks = self.template is not None and _MARKS.search(self.template.source) is not None
        self._starts_answers = False

    def prompt(self, turns: Turns, origin: Origin) -> Document:
        """Return the turns with the start of an answer; nothing is learned.

        The token that ends an answer is counted: that of one which stands for those that will be sampled.
        """
        self.conversation((*turns, Turn("assistant", _ANSWER)), origin, "last_answer", len(turns))
        ids = self._ids(self._render(turns, origin, starts_answer=True))
        return Document.of(ids, [False] * len(ids))

    def plain(self, prompt: str, completion: str) -> Document:
        """Return a text without turns, which the end of text follows; the completion and that end are learned."""
        encode = self.tokenizer.encode_as_prompt if self.adds_tokens else self.tokenizer.encode
        ids, before = encode(prompt + completion), encode(prompt) if prompt else []
        start = _shared(ids, before)
        if ids[-1:] != [self.tokenizer.eot_id]:
            ids = [*ids, self.tokenizer.eot_id]
        self._count(ids[-1])
        return Document.of(ids, [index >= start for index in range(len(ids))])

    def conversation(self, turns: Turns, origin: Origin, loss_on: LossOn = "answers", first_turn: int = 0) -> Document:
        """Return a conversation, of which the answers are learned, each with the token that ends it.

        Args:
            turns: end with an answer.
            loss_on: which of the answers are learned; all: every token.
            first_turn: answers before this turn are not learned: the prompt of a pair has answers too.

        Raises:
            DataError: the template rewrites history, or leaves nothing to learn.
        """
        whole = self._render(turns, origin)
        ids = self._ids(whole)
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant" and number >= first_turn]
        spans = list(self._spans(turns, answers, whole, ids, origin))
        end = spans[-1][1]
        if ids[end - 1] not in self._control:  # the template ends no turn: end of text does
            ids, end = [*ids[:end], self.tokenizer.eot_id], end + 1
            spans[-1] = (spans[-1][0], end)
        for _, stop in spans:
            self._count(ids[stop - 1])
        if loss_on == "all":
            return Document.of(ids, [True] * len(ids))
        learned = [False] * len(ids)
        for start, stop in spans[-1:] if loss_on == "last_answer" else spans:
            learned[start:stop] = [True] * (stop - start)
        document = Document.of(ids, learned)
        if not document.num_learned:
            raise DataError(f"{origin}: {self._name} leaves nothing to learn; its answers must appear in the text")
        return document

    def _spans(
        self, turns: Turns, answers: Sequence[int], whole: str, ids: Sequence[int], origin: Origin
    ) -> Iterator[tuple[int, int]]:
        """Yield the tokens [start, end) of each answer."""
        marked = list(self._marked_spans(turns, ids, origin)) if self._marks else []
        number_of = {
            turn: number for number, turn in enumerate(t for t, each in enumerate(turns) if each.role == "assistant")
        }
        for answer in answers:
            before = self._render(turns[:answer], origin, starts_answer=True)
            self._check_start(turns[:answer], before, origin)
            after = whole if answer == len(turns) - 1 else self._render(turns[: answer + 1], origin)
            if not after.startswith(before) or not whole.startswith(after):
                raise DataError(
                    f"{origin}: {self._name} rewrites history: what comes before turn {answer + 1} differs in the "
                    "whole conversation from the prompt of that answer, so a model would learn from prompts that it "
                    "never gets; take a template that only appends, such as finetune.chat_template: chatml"
                )
            if marked:
                if number_of[answer] >= len(marked):
                    raise DataError(f"{origin}: {self._name} marks no words of turn {answer + 1} by {{% generation %}}")
                yield marked[number_of[answer]]
            else:
                yield self._span(ids, _shared(ids, self._ids(before)), _shared(ids, self._ids(after)), origin)

    def _check_start(self, prompt: Turns, rendered: str, origin: Origin) -> None:
        """Raise DataError where the template writes something before an answer that its prompts lack.

        Looks at the first prompt alone. Templates whose prompts end with the user's words, and write nothing before an
        answer, need not look at add_generation_prompt.
        """
        if self._starts_answers or not prompt:
            return
        if rendered == self._render(prompt, origin):
            first, other = (
                self._render((*prompt, Turn("assistant", each)), origin) for each in (_ANSWER, _OTHER_ANSWER)
            )
            alike = next((index for index, pair in enumerate(zip(first, other, strict=False)) if len({*pair}) > 1), 0)
            start = first[len(rendered) : alike].strip()
            if start:
                raise DataError(
                    f"{origin}: {self._name} writes {start!r} before an answer and not at the end of a prompt, for it "
                    "does not look at add_generation_prompt: a model would learn to write it before every answer; end "
                    "the template by {% if add_generation_prompt %} and that text, or take finetune.chat_template: "
                    "chatml"
                )
        self._starts_answers = True

    def _span(self, ids: Sequence[int], start: int, end: int, origin: Origin) -> tuple[int, int]:
        """Return the tokens of an answer without what the template writes after the token that ends its turn."""
        if start >= end:
            raise DataError(f"{origin}: {self._name} leaves nothing to learn; its answers must appear in the text")
        last = next((index for index in range(end - 1, start - 1, -1) if ids[index] in self._control), None)
        return (start, end if last is None else last + 1)

    def _marked_spans(self, turns: Turns, ids: Sequence[int], origin: Origin) -> Iterator[tuple[int, int]]:
        """Yield the tokens of each block {% generation %}, with the token after it where that ends the turn."""
        text, seen = self._render(turns, origin, marks_generation=True), ""
        for number, piece in enumerate(text.split(GENERATED)):
            inside, mark, after = piece.partition(GENERATED_END)
            if number and mark:
                start = _shared(ids, self._ids(seen))
                end = _shared(ids, self._ids(seen + inside))
                has_end = any(ids[index] in self._control for index in range(max(start, end - 1), end))
                yield start, end + (not has_end and end < len(ids) and ids[end] in self._control)
            seen += inside + after

    def _render(
        self, turns: Turns, origin: Origin, *, starts_answer: bool = False, marks_generation: bool = False
    ) -> str:
        """Return the text, with marks where messages spell control tokens."""
        if self.template is None or self._pattern is None:
            raise DataError(
                f"{origin} has turns, and the model has no chat template that writes them; set finetune.chat_template "
                "to chatml, llama3 or the path of a Jinja file"
            )
        try:
            messages = [marked_message(turn.message, self._pattern) for turn in turns]
            return self.template.render(
                messages, add_generation_prompt=starts_answer, marks_generation=marks_generation
            )
        except ChatError as error:
            raise DataError(f"{origin}: {error}") from error

    def _ids(self, text: str) -> list[int]:
        assert self._pattern is not None, "a text that the template has rendered"
        return encode_marked(text, self._pattern, self.tokenizer)

    def _count(self, end: int) -> None:
        self.ends[end] = self.ends.get(end, 0) + 1

    @property
    def _name(self) -> str:
        return "the chat template" if self.template is None else f"the chat template of {self.template.origin}"


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning.

    A token that holds both the end of a prompt and the beginning of an answer is the answer's: the prompt alone never
    has it.
    """
    for index, (mine, other) in enumerate(zip(ids, others, strict=False)):
        if mine != other:
            return index
    return min(len(ids), len(others))
