"""Modes: what a model is asked with and without a chat template; long texts in passages, of which nothing is lost."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.runtime.infer.chat import ChatError
from trimaran.runtime.infer.modes import (
    ANSWER,
    CONTINUE,
    LANGUAGES,
    Mode,
    language_of,
    mode_of,
    prompt_in_mode,
    rounds,
    split_passages,
)
from trimaran.runtime.infer.prompts import Prompt, conversation

TRANSLATE, SUMMARIZE = Mode("translate", "tr"), Mode("summarize")


def test_with_a_template_each_mode_is_a_fixed_instruction() -> None:
    asked = "Translate the following text into Turkish. Write only the translation.\n\nA {text} {language}."
    text = "A {text} {language}."
    assert prompt_in_mode(TRANSLATE, text, has_template=True) == conversation(asked)
    assert prompt_in_mode(SUMMARIZE, "Long.", has_template=True, system="be kind") == conversation(
        "Summarize the following text in a few sentences. Write only the summary.\n\nLong.", "be kind"
    )
    assert prompt_in_mode(ANSWER, text, has_template=True) == conversation(text)
    assert prompt_in_mode(CONTINUE, text, has_template=True) == Prompt(text), "a text is continued as it is"


def test_without_a_template_a_text_is_asked_for_by_its_form_or_refused() -> None:
    assert prompt_in_mode(SUMMARIZE, "Long.\n", has_template=False) == Prompt("Long.\n\nTL;DR:")
    assert prompt_in_mode(TRANSLATE, "A cat.", has_template=False) == Prompt("A cat.\n\nTranslation into Turkish:\n")
    assert prompt_in_mode(CONTINUE, "A cat", has_template=False) == Prompt("A cat")
    for mode, system, words in (
        (
            ANSWER,
            None,
            "has no chat template: it was not tuned for conversations and only continues texts; use --mode c",
        ),
        (SUMMARIZE, "be kind", "so there is no system message to give it"),
        (CONTINUE, "be kind", "a text that is continued has no system message"),
    ):
        with pytest.raises(ChatError, match=words):
            prompt_in_mode(mode, "Why?", has_template=False, system=system)


def test_modes_and_languages_by_name_and_the_nearest_for_a_wrong_one() -> None:
    assert mode_of("translate", "TR") == mode_of("translate", "turkish") == TRANSLATE
    assert (mode_of("answer"), mode_of("continue")) == (ANSWER, CONTINUE)
    assert all(language_of(code) == language_of(name) == code for code, name in LANGUAGES.items())
    for arguments, words in (
        (("translat", "tr"), r"--mode \(translat\) must be one of continue, answer, .*; did you mean translate\?"),
        (("translate", None), "needs --to, the code of a language such as tr or de"),
        (("translate", "turk"), r"--to \(turk\) is no language known here; did you mean tr \(Turkish\)\?"),
        (("translate", "tu"), r"did you mean tr \(Turkish\)\?"),
        (("translate", "sp"), r"did you mean es \(Spanish\)\?"),
        (("translate", "qqq"), r"--to \(qqq\) is no language known here; give a code of ISO 639-1, such as tr or de"),
        (("answer", "tr"), "--to is for --mode translate, and the mode is answer"),
    ):
        with pytest.raises(ValueError, match=words):
            mode_of(*arguments)


def test_passages_end_at_paragraphs_then_sentences_then_words() -> None:
    paragraphs = "One one.\n\nTwo two.\n \n Three three."
    assert split_passages(paragraphs, lambda text: len(text) <= 22) == ["One one.\n\nTwo two.\n \n ", "Three three."]
    sentences = 'He said: "No." She left! Really? Yes… So'
    assert split_passages(sentences, lambda text: len(text) <= 15) == [
        'He said: "No." ',
        "She left! ",
        "Really? Yes… So",
    ]
    assert split_passages("これは猫。あれは犬。", lambda text: len(text) <= 6) == ["これは猫。", "あれは犬。"]
    assert split_passages("abc defgh", lambda text: len(text) <= 4) == ["abc ", "defg", "h"]
    assert split_passages("", lambda text: True) == [""]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab .!?\n\tş🙂", max_size=120), st.integers(1, 40))
def test_passages_put_together_are_the_text_and_each_fits(text: str, length: int) -> None:
    passages = split_passages(text, lambda each: len(each) <= length)
    assert "".join(passages) == text
    assert all(0 < len(each) <= length for each in passages) or text == ""


def test_a_text_of_a_megabyte_is_cut_without_looking_at_all_of_it_again_and_again() -> None:
    looked = 0

    def fits(text: str) -> bool:
        nonlocal looked
        looked += len(text)
        return len(text) <= 1000

    text = "A sentence of words. " * 50_000
    assert "".join(split_passages(text, fits)) == text
    assert looked < 20 * len(text)


def answered(mode: Mode, text: str, length: int, answer: "object") -> tuple[str, list[Sequence[str]], list[str]]:
    """Return the result, the passages of each round and the notes."""
    parts, given_, found, notes = rounds(mode, text, lambda each: len(each) <= length), None, [], []
    while True:
        try:
            each = parts.send(given_)  # type: ignore[arg-type]
        except StopIteration as ended:
            return ended.value, found, notes
        found.append(each.passages)
        notes += [each.note] if each.note else []
        given_ = [answer(passage) for passage in each.passages]  # type: ignore[operator]


def test_translations_are_put_together_with_the_white_space_between_their_passages() -> None:
    text = "\n One one.\n\nTwo two.  Three three.\n\n\nFour.\n"
    result, passages, notes = answered(TRANSLATE, text, 12, lambda passage: f" {passage.strip().upper()}\n")
    assert result == "ONE ONE.\n\nTWO TWO.  THREE THREE.\n\n\nFOUR."
    assert len(passages) == 1
    assert notes == ["the text is translated in 4 passages, each for itself"]
    assert answered(TRANSLATE, "Short.", 12, str.upper) == ("SHORT.", [("Short.",)], [])


def test_summaries_of_passages_are_summarized_until_one_passage_holds_all() -> None:
    text = "Many words are here. " * 40
    result, passages, notes = answered(SUMMARIZE, text, 100, lambda passage: passage[:9])
    assert result == "Many word"
    assert [len(each) for each in passages] == [10, 2, 1]
    assert notes == [
        "the text is summarized in 10 passages, each for itself, then their summaries",
        "the text is summarized in 2 passages, each for itself, then their summaries",
    ]


def test_summaries_that_get_no_shorter_end_the_rounds() -> None:
    text = "Many words are here. " * 40
    result, passages, _ = answered(SUMMARIZE, text, 100, lambda passage: passage)
    assert len(passages) == 1
    assert result.startswith("Many words")


def test_a_context_without_room_for_any_passage_is_told() -> None:
    with pytest.raises(ValueError, match="has no room for a passage beside the instruction and the answer"):
        next(rounds(TRANSLATE, "text", lambda each: False))


def test_a_plain_translation_goes_by_paragraphs_because_its_answer_ends_at_a_blank_line() -> None:
    assert TRANSLATE.stop_strings(has_template=False) == ("\n\n",)
    assert TRANSLATE.stop_strings(has_template=True) == ANSWER.stop_strings(has_template=False) == ()
    assert not TRANSLATE.may_be_passage("One.\n\nTwo.", has_template=False)
    assert TRANSLATE.may_be_passage("One.\nTwo.\n\n", has_template=False)
    assert SUMMARIZE.may_be_passage("One.\n\nTwo.", has_template=False)
