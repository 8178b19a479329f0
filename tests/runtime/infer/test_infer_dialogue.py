"""A conversation's next prompt begins with the last one's tokens; in a full context the oldest turns leave whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.infer.chat import ChatError, ChatTemplate
from trimaran.runtime.infer.dialogue import (
    Dialogue,
    Exchange,
    TooLongError,
    Turn,
    Written,
    encoder_of,
    fit,
    written_after,
)
from trimaran.runtime.infer.prompts import RunText

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_CONTROL = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}assistant: "
)


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token, and the merge of "a" and "b" is a further one, so that texts have several encodings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "ab"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner, "test")


def text_of(template: str | None) -> RunText:
    tokenizer = bytes_tokenizer()
    found = None if template is None else ChatTemplate(template, "test")
    return RunText(Path("run"), tokenizer, (tokenizer.eot_id,), found, is_imported=False)


def asked(text: RunText, dialogue: Dialogue, question: str, context: int = 10_000, *, is_plain: bool = False) -> Turn:
    return fit(dialogue, question, encoder_of(text, is_plain=is_plain), context, 100)


def answered(text: RunText, turn: Turn, question: str, drawn: list[int], *, is_plain: bool = False) -> Dialogue:
    answer = text.tokenizer.decode(drawn)
    written = written_after(turn, answer, tuple(drawn), text, is_plain=is_plain)
    return turn.dialogue.answered(Exchange(question, answer, written))


@pytest.mark.parametrize("is_plain", [False, True])
def test_the_next_prompt_begins_with_all_tokens_of_the_last_turn(is_plain: bool) -> None:
    text = text_of(None if is_plain else CHATML)
    letters = [text.tokenizer.id_of(each) or 0 for each in "abab"]
    first = asked(text, Dialogue("be kind"), "why?", is_plain=is_plain)
    dialogue = answered(text, first, "why?", letters, is_plain=is_plain)
    second = asked(text, dialogue, "and now?", is_plain=is_plain)
    assert text.tokenizer.encode("abab") != letters, "the usual encoding is another one"
    assert second.tokens[: len(first.tokens) + 4] == (*first.tokens, *letters)
    assert text.tokenizer.decode(second.tokens) == text.tokenizer.decode(
        encoder_of(text, is_plain=is_plain)(replace(dialogue, exchanges=(Exchange("why?", "abab"),)), "and now?").tokens
    )


def test_the_text_of_turns_is_the_template_s() -> None:
    text = text_of(CHATML)
    dialogue = Dialogue("s", (Exchange("q<|im_end|>", "a"),))
    turn = asked(text, dialogue, "r")
    assert text.tokenizer.decode(turn.tokens) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    )
    assert turn.tokens.count(text.tokenizer.id_of("<|im_end|>")) == 4, "a question's own spelling is text"


@pytest.mark.parametrize("template", [TRIMMING, WITHOUT_CONTROL])
def test_where_the_text_may_not_go_on_from_the_tokens_it_is_encoded_anew(template: str) -> None:
    text = text_of(template)
    letters = [text.tokenizer.id_of(each) or 0 for each in "abĠ"]
    first = asked(text, Dialogue(), "why?")
    dialogue = answered(text, first, "why?", letters)
    second = asked(text, dialogue, "so?")
    anew = encoder_of(text, is_plain=False)(Dialogue(None, (Exchange("why?", "ab "),)), "so?")
    assert second.tokens == anew.tokens


def test_a_plain_conversation_is_one_growing_text() -> None:
    text = text_of(None)
    dialogue = Dialogue("A play.", (Exchange("To be", ", or not\n"), Exchange("HAMLET", ": words")))
    turn = asked(text, dialogue, "Enter", is_plain=True)
    assert text.tokenizer.decode(turn.tokens) == "A play.\nTo be, or not\nHAMLET: words\nEnter"
    with pytest.raises(ChatError, match="has no chat template"):
        encoder_of(text, is_plain=False)


def characters(dialogue: Dialogue, question: str) -> Written:
    """An encoding in which each character of a message is a token."""
    whole = "".join(each["content"] for each in dialogue.asked(question))
    return Written(whole, tuple(range(len(whole))))


def test_the_oldest_turns_leave_as_whole_turns_and_the_system_message_stays() -> None:
    dialogue = Dialogue("s" * 10, tuple(Exchange("q" * 10, "a" * 10) for _ in range(5)))
    turn = fit(dialogue, "q" * 10, characters, 200, 100)
    assert (turn.dialogue.first, len(turn.tokens)) == (3, 60), "75 is three quarters of the 100 that the answer leaves"
    assert turn.note == "the context is full: the oldest 3 turns left it, and the model knows them no more"
    assert turn.text.startswith("s" * 10)
    assert len(turn.dialogue.messages()) == 11, "the history keeps them"
    further = fit(turn.dialogue.answered(Exchange("q" * 10, "a" * 10)), "q" * 10, characters, 200, 100)
    assert (further.dialogue.first, further.note) == (3, ""), "there is room for further turns"


def test_a_question_that_fills_the_context_is_refused() -> None:
    dialogue = Dialogue("s" * 10, (Exchange("q", "a"),))
    last = fit(dialogue, "q" * 189, characters, 200, 100)
    assert (last.dialogue.first, len(last.tokens)) == (1, 199)
    assert fit(Dialogue("s" * 10), "q" * 189, characters, 200, 100).note == ""
    with pytest.raises(TooLongError, match="prompt with the system message has 200 tokens, and the model's context of"):
        fit(dialogue, "q" * 190, characters, 200, 100)
    with pytest.raises(TooLongError, match="this prompt has 200 tokens"):
        fit(Dialogue(), "q" * 200, characters, 200, 9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
    st.integers(0, 60),
    st.integers(2, 300),
    st.integers(0, 400),
)
def test_a_prompt_never_fills_the_context(
    lengths: list[tuple[int, int]], question: int, context: int, answer_tokens: int
) -> None:
    dialogue = Dialogue("s", tuple(Exchange("q" * each[0], "a" * each[1]) for each in lengths))
    try:
        turn = fit(dialogue, "q" * question, characters, context, answer_tokens)
    except TooLongError:
        assert question + 1 >= context
        return
    room = context - max(1, min(answer_tokens, context // 2))
    assert len(turn.tokens) < context
    assert len(turn.tokens) <= room or not turn.dialogue.remembered
    assert bool(turn.note) == (turn.dialogue.first > 0)
    assert turn.dialogue.exchanges == dialogue.exchanges


def test_a_turn_is_taken_back() -> None:
    dialogue = Dialogue(None, (Exchange("a", "b"), Exchange("c", "d")), first=2)
    assert dialogue.undone() == Dialogue(None, (Exchange("a", "b"),), first=1)
    with pytest.raises(ValueError, match="no turn to take back"):
        Dialogue().undone()


def test_the_tokens_of_few_exchanges_are_kept() -> None:
    dialogue = Dialogue()
    for number in range(10):
        dialogue = dialogue.answered(Exchange(str(number), "a", Written("t", (number,))))
    assert [each.question for each in dialogue.exchanges] == [str(number) for number in range(10)]
    assert [each.written is not None for each in dialogue.exchanges] == [False] * 5 + [True] * 5
