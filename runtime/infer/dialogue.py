"""The history of a conversation, and how it is fitted into a model's context. Pure: no model, no torch.

What the model has drawn is not encoded anew for the next turn: a text has many encodings, and only with the drawn one
does the next prompt begin with the tokens whose keys and values are still there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.infer.chat import ChatTemplate, check_messages, encode_marked, marked_message
from trimaran.runtime.infer.prompts import Prompt, RunText

_AFTER_FULL: Final = 0.75
"""Of the room of a prompt, what the turns that stay take at most: else every further turn would be computed whole."""
_TOKENS_OF: Final = 4  # exchanges, before the last
_CONTEXT_TOKENS: Final = 8  # before new text that are decoded with it, to see whether it is as it was meant


class TooLongError(ValueError):
    """A question that the context has no room for; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation up to the end of an answer, as the model has it.

    Args:
        text: with the marks of `marked_message` where a template has written it.
        tokens: the prompt and what was drawn.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer, as far as it got.

    Args:
        written: None where the answer was not drawn here, or is not all of what was drawn.
    """

    question: str
    answer: str
    written: Written | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation.

    Args:
        first: number of the first exchange that the model is still told of.
    """

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()
    first: int = 0

    @property
    def remembered(self) -> tuple[Exchange, ...]:
        """The exchanges that the model is still told of."""
        return self.exchanges[self.first :]

    def answered(self, exchange: Exchange) -> "Dialogue":
        """Return the conversation with one exchange more.

        The tokens of the last few are kept, each those of all before it: what is asked after /undo goes on from them.
        """
        old, last = self.exchanges[:-_TOKENS_OF], self.exchanges[-_TOKENS_OF:]
        if old and old[-1].written is not None:
            old = (*old[:-1], replace(old[-1], written=None))
        return replace(self, exchanges=(*old, *last, exchange))

    def undone(self) -> "Dialogue":
        """Return the conversation without its last exchange; ValueError where it has none."""
        if not self.exchanges:
            raise ValueError("there is no turn to take back")
        return replace(self, exchanges=self.exchanges[:-1], first=min(self.first, len(self.exchanges) - 1))

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """Return all messages, with a further question where there is one."""
        return _messages(self.system, self.exchanges, question)

    def asked(self, question: str) -> list[dict[str, str]]:
        """Return the messages that the model is told of, and the question."""
        return _messages(self.system, self.remembered, question)


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model is given for a question.

    Args:
        dialogue: before the question; its `first` is what the context has room for.
        text: that the tokens stand for, as in `Written`.
        note: a sentence for the user where turns have left the context, else "".
    """

    dialogue: Dialogue
    tokens: tuple[int, ...]
    text: str
    note: str = ""


Encode = Callable[[Dialogue, str], Written]
"""From a conversation and a question to the prompt."""


def fit(dialogue: Dialogue, question: str, encode: Encode, context: int, answer_tokens: int) -> Turn:
    """Return the prompt of a question, which leaves room for the answer; the oldest exchanges leave where need be.

    Where some have to leave, as many do as make room for further turns. The system message and the question stay; a
    question alone may take the room of its answer, but for one token.

    Args:
        context: of the model, in tokens.
        answer_tokens: longest answer, of which at most half of the context is kept free.

    Raises:
        TooLongError: the question and the system message alone fill the context.
    """
    room = context - max(1, min(answer_tokens, context // 2))
    prompt, remembered = encode(dialogue, question), len(dialogue.remembered)
    if len(prompt.tokens) <= room or (not remembered and len(prompt.tokens) < context):
        return Turn(dialogue, prompt.tokens, prompt.text)

    def without(count: int) -> Dialogue:
        return replace(dialogue, first=dialogue.first + count)

    low, high = 1, max(1, remembered)  # the fewest that must leave
    while low < high:
        middle = (low + high) // 2
        is_enough = len(encode(without(middle), question).tokens) <= _AFTER_FULL * room
        low, high = (low, middle) if is_enough else (middle + 1, high)
    kept = without(min(low, remembered))
    prompt = encode(kept, question)
    if len(prompt.tokens) >= context:
        beside = " with the system message" if dialogue.system else ""
        raise TooLongError(
            f"this prompt{beside} has {len(prompt.tokens):,} tokens, and the model's context of {context:,} has no "
            "room for it and an answer; shorten it"
        )
    gone = kept.first - dialogue.first
    note = f"the context is full: the oldest {counted(gone, 'turn')} left it, and the model knows them no more"
    return Turn(kept, prompt.tokens, prompt.text, note)


def encoder_of(text: RunText, *, is_plain: bool) -> Encode:
    """Return what encodes conversations for the model of a run.

    Args:
        is_plain: whether a conversation is one growing text in the place of turns by the chat template.

    Raises ChatError where there is no template and the conversation is not plain.
    """
    if is_plain:
        return lambda dialogue, question: _plain_prompt(text, dialogue, question)
    template = text.required_template()
    return lambda dialogue, question: _chat_prompt(text, template, dialogue, question)


def written_after(turn: Turn, answer: str, drawn: tuple[int, ...], text: RunText, *, is_plain: bool) -> Written:
    """Return the conversation as the model has it after an answer, all of whose tokens belong to it."""
    marked = answer if is_plain else marked_message(answer, text.required_template().control_pattern(text.tokenizer))
    return Written(turn.text + marked, turn.tokens + drawn)


def _messages(system: str | None, exchanges: tuple[Exchange, ...], question: str | None) -> list[dict[str, str]]:
    found = [] if system is None else [("system", system)]
    for each in exchanges:
        found += [("user", each.question), ("assistant", each.answer)]
    found += [] if question is None else [("user", question)]
    return [{"role": role, "content": content} for role, content in found]


def _last_written(dialogue: Dialogue) -> Written | None:
    return dialogue.remembered[-1].written if dialogue.remembered else None


def _chat_prompt(text: RunText, template: ChatTemplate, dialogue: Dialogue, question: str) -> Written:
    messages = dialogue.asked(question)
    check_messages(messages)
    pattern = template.control_pattern(text.tokenizer)
    marked: list[Any] = [marked_message(each, pattern) for each in messages]
    rendered = template.render(marked)
    before = _last_written(dialogue)
    if before is not None and rendered.startswith(before.text):
        rest = rendered[len(before.text) :]
        # Where the template goes on with one of its own tokens, the encoding of the rest does not depend on the answer.
        if pattern.match(rest):
            return Written(rendered, before.tokens + tuple(encode_marked(rest, pattern, text.tokenizer)))
    return Written(rendered, tuple(encode_marked(rendered, pattern, text.tokenizer)))


def _plain_prompt(text: RunText, dialogue: Dialogue, question: str) -> Written:
    pieces = [] if dialogue.system is None else [dialogue.system]
    whole = ""
    for piece in (*pieces, *(each.question + each.answer for each in dialogue.remembered), question):
        whole += ("\n" if whole and not whole.endswith("\n") else "") + piece
    before, tokenizer = _last_written(dialogue), text.tokenizer
    if before is not None and whole.startswith(before.text):
        rest = whole[len(before.text) :]
        added, last = tokenizer.encode(rest), list(before.tokens[-_CONTEXT_TOKENS:])
        # Some tokenizers put a space before every text that they encode.
        if tokenizer.decode(last + added) == tokenizer.decode(last) + rest:
            return Written(whole, before.tokens + tuple(added))
    return Written(whole, tuple(text.encode(Prompt(whole))))
