"""Prompts keep to their budget, and citations and quotes in an answer lead to what the passages really say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimaran.runtime.twin.passages import Passage, write_texts
from trimaran.runtime.twin.report.questions import follow_up
from trimaran.runtime.twin.retrieval.citations import Checked, CitationStream, check_citations, overlap
from trimaran.runtime.twin.retrieval.grounding import Grounding, grounded_messages, numbered
from trimaran.runtime.twin.retrieval.library import Library
from trimaran.runtime.twin.retrieval.phrases import language_of_question, phrases_of
from trimaran.runtime.twin.retrieval.quotes import check_quotes
from trimaran.runtime.twin.retrieval.silence import build_index
from trimaran.runtime.twin.retrieval.terms import Terms

HAMLET = (
    "HAMLET.\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\nOr to take arms against a sea of troubles--\nAnd by opposing end"
    " them?"
)
YORICK = (
    "HAMLET.\nAlas, poor Yorick! I knew him, Horatio: a fellow\nof infinite jest, of most excellent fancy: he hath\n"
    "borne me on his back a thousand times."
)
TURKISH = "Işık köyün üstüne düştü. İhtiyar değirmenci, “Kapıyı açma,” dedi. Çocuklar ırmağın kıyısında bekliyordu."


def passage(number: int, text: str, line: int = 1) -> Passage:
    lines = text.count("\n")
    return Passage(
        number, 0, "hamlet.md", "Hamlet", f"ACT {number}", 0, len(text), line, line + lines, text, is_held_out=False
    )


PASSAGES = [passage(7, HAMLET, 100), passage(9, YORICK, 500)]
TERMS = Terms("en")


def check(answer: str, passages: list[Passage] = PASSAGES, language: str = "en") -> Checked:
    checked = check_citations(answer, passages, Terms(language))
    for each in checked.citations:
        assert checked.text[each.start : each.end] == f"[{each.number}]"
        assert 1 <= each.number <= len(passages)
    for quote in checked.quotes:
        assert checked.text[quote.start : quote.end][1:-1] == quote.text
    return checked


def count_words(text: str) -> int:
    return len(text.split())


def ground(budget: int, question: str = "What does Hamlet ask himself?") -> Grounding:
    return grounded_messages(
        question, PASSAGES, texts="en", count_tokens=count_words, budget_tokens=budget, system="You are Hamlet."
    )


def test_a_prompt_has_instruction_numbered_passages_and_question() -> None:
    made = ground(1000)
    system, user = made.messages
    assert system["content"] == "You are Hamlet.\n\n" + phrases_of("en").instruction
    assert user["content"] == (
        f"Passages:\n\n[1] Hamlet, ACT 7\n{HAMLET}\n\n[2] Hamlet, ACT 9\n{YORICK}"
        "\n\nQuestion: What does Hamlet ask himself?"
    )
    assert (made.passages, made.left_out, made.is_cut) == (tuple(PASSAGES), 0, False)


@pytest.mark.parametrize("budget", [0, 60, 85])
def test_a_budget_without_room_for_a_passage_is_told(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"a budget of {budget} tokens has no room for a passage .* \(\d+ tokens\)"):
        ground(budget)


@given(st.integers(115, 250))
def test_a_prompt_keeps_to_its_budget(budget: int) -> None:
    made = ground(budget)
    assert sum(count_words(each["content"]) for each in made.messages) <= budget
    assert len(made.passages) + made.left_out == len(PASSAGES)
    for number, each in enumerate(made.passages, 1):
        whole = numbered(number, each)
        shown = made.messages[1]["content"].split(f"[{number}]")[1].split("\n\n")[0]
        assert whole.startswith(f"[{number}]{shown}")
        if whole != f"[{number}]{shown}":
            assert made.is_cut
            assert number == len(made.passages)


def test_without_a_passage_there_is_no_prompt() -> None:
    with pytest.raises(ValueError, match="silent_answer"):
        grounded_messages("What?", [], texts="en", count_tokens=count_words, budget_tokens=1000)


def test_the_instruction_is_in_the_language_of_the_question() -> None:
    assert language_of_question("Hamlet babasının hayaletini görünce ne yaptı?", "en") == "tr"
    made = ground(1000, "Hamlet babasının hayaletini görünce ne yaptı?")
    assert made.messages[1]["content"].startswith("Pasajlar:")


def test_valid_citations_lead_to_title_and_lines_and_invalid_ones_go() -> None:
    checked = check(
        "He asks whether to be or not to be [1]. Yorick bore him on his back a thousand times [2, 7]. No [0][44]."
    )
    assert (
        checked.text == "He asks whether to be or not to be [1]. Yorick bore him on his back a thousand times [2]. No."
    )
    assert checked.invalid == (7, 0, 44)
    first, second = checked.citations
    assert (first.passage, first.title, first.chapter, first.first_line, first.last_line) == (
        7,
        "Hamlet",
        "ACT 7",
        100,
        105,
    )
    assert (second.passage, second.file, second.first_line, second.last_line) == (9, "hamlet.md", 500, 503)
    assert not first.is_attached
    assert second.is_supported
    assert not check("The weather is nice [1].").citations[0].is_supported


@pytest.mark.parametrize(
    ("answer", "text", "numbers"),
    [
        ("A [1-2].", "A [1][2].", [1, 2]),
        ("A [1–2] and [2;1].", "A [1][2] and [2][1].", [1, 2, 2, 1]),
        ("A [1,9].", "A [1].", [1]),
        ("A[2] b", "A[2] b", [2]),
        ("A [1-900] b", "A [1] b", [1]),
        ("A [ 2 ] [[7]9] [1][[8]2] b", "A [2] [1][2] b", [2, 1, 2]),
        ("In [1603] and [Exit] and [1a]", "In [1603] and [Exit] and [1a]", []),
    ],
)
def test_forms_of_citations(answer: str, text: str, numbers: list[int]) -> None:
    checked = check(answer)
    assert checked.text == text
    assert [each.number for each in checked.citations] == numbers


def test_an_answer_without_citations_gets_them_where_the_overlap_is_real() -> None:
    checked = check(
        "I knew poor Yorick. He hath borne me on his back a thousand times! And troubles are a sea."
        "\nOutrageous fortune has slings and arrows to suffer in the mind."
    )
    assert checked.text == (
        "I knew poor Yorick. He hath borne me on his back a thousand times! [2] And troubles are a sea."
        "\nOutrageous fortune has slings and arrows to suffer in the mind. [1]"
    )
    assert all(each.is_attached and each.is_supported for each in checked.citations)
    assert check("The captain sold seven letters, and the river was cold.").citations == ()
    assert check("").text == ""


def test_no_citation_is_put_inside_a_quote() -> None:
    answer = 'He said: "Alas, poor Yorick! I knew him, Horatio: a fellow of infinite jest."'
    checked = check(answer)
    assert checked.text == answer + " [2]"
    assert [quote.is_verbatim for quote in checked.quotes] == [True]


def test_citations_of_a_model_s_own_are_not_added_to() -> None:
    answer = "He hath borne me on his back a thousand times. To be, or not to be, that is the question [1]."
    assert check(answer).text == answer


def test_overlap_needs_a_run_or_many_terms() -> None:
    words = TERMS.words(YORICK)
    assert overlap("him, Horatio: a fellow of", words, TERMS) == 0
    assert overlap("him, Horatio: a fellow of infinite", words, TERMS) > 0
    assert overlap("a fellow of fancy and jest, excellent Horatio", words, TERMS) > 0
    assert overlap("jest, fancy, fellow", words, TERMS) == 0
    far = TERMS.words("Horatio jest " + "and so on " * 30 + "fancy fellow excellent")
    assert overlap("a fellow of fancy and jest, excellent Horatio", far, TERMS) == 0
    assert overlap("a fellow of fancy and jest, Horatio, who sold seven letters to the captain", words, TERMS) == 0


@pytest.mark.parametrize(
    ("quote", "number", "lines"),
    [
        ('"To be, or not to be: that is the question"', 1, (101, 101)),
        ("“To be, or not to be: that is the question:\nWhether 'tis nobler”", 1, (101, 102)),
        ("«Whether ’tis nobler in the mind to suffer / The slings and arrows»", 1, (102, 103)),
        ("„a sea of troubles — And by opposing”", 0, (0, 0)),
        ("„a sea of troubles—\n And by opposing“", 1, (104, 105)),
        ("‘Alas, poor Yorick!’", 2, (501, 501)),
        ('"Alas, poor Yorick ... he hath borne me on his back,"', 2, (501, 503)),
        ('"he hath borne [...] Alas, poor Yorick"', 0, (0, 0)),
        ('"Alas, poor Yorick … to take arms"', 0, (0, 0)),
        ('"Alas, poor Yorik!"', 0, (0, 0)),
        ('"alas, poor Yorick!"', 0, (0, 0)),
        ('"las, poor Yorick"', 0, (0, 0)),
        ('"Alas, poor Yorick! I knew him well"', 0, (0, 0)),
    ],
)
def test_quotes_are_held_against_the_passages_by_character(quote: str, number: int, lines: tuple[int, int]) -> None:
    (found,) = check_quotes(f"He says {quote} and goes.", PASSAGES)
    assert (found.number, found.first_line, found.last_line) == (number, *lines)
    assert found.is_verbatim == (number > 0)


@pytest.mark.parametrize(
    "text", ["don't say it isn't", 'The "ghost" alone', "‘tis not’s", '5" of rain', "it’s the king’s own"]
)
def test_what_is_no_quote(text: str) -> None:
    assert check_quotes(text, PASSAGES) == []


def test_wrong_quotes_are_marked_in_the_text() -> None:
    checked = check('He says "to be or not" and "Alas, poor Yorick!" and "I never knew him" [2].')
    assert checked.marked(phrases_of("en").not_verbatim) == (
        'He says "to be or not" (not in these words in the passages) and "Alas, poor Yorick!" and "I never knew him"'
        " (not in these words in the passages) [2]."
    )


def test_turkish_answers() -> None:
    passages = [passage(3, TURKISH)]
    checked = check("IRMAĞIN kıyısında çocuklar bekliyordu, ışık köyün üstüne düştü.", passages, "tr")
    assert [each.number for each in checked.citations] == [1]
    (quote,) = check_quotes("Değirmenci «Kapıyı açma» dedi.", passages)
    assert quote.is_verbatim


@given(st.integers(0, len(HAMLET) - 2), st.integers(10, 80))
def test_whatever_words_of_a_passage_are_quoted_are_verbatim(start: int, length: int) -> None:
    words = HAMLET.split()
    first = start % len(words)
    quote = " ".join(words[first : first + 2 + length % 9])
    found = check_quotes(f"“{quote}”", PASSAGES)
    assert all(each.number == 1 for each in found)
    assert bool(found) == (len(quote.split()) > 1)


@given(st.text(alphabet='ab [1]29,-–"“”‘’.!\n', max_size=40), st.integers(1, 5))
@example("[[7]9] [ 2 ]", 1)
def test_in_any_answer_every_citation_that_is_shown_is_valid_while_it_arrives_too(answer: str, size: int) -> None:
    checked, stream = check(answer), CitationStream(len(PASSAGES))
    pieces = [stream.add(answer[start : start + size]) for start in range(0, len(answer), size)]
    shown = "".join([*pieces, stream.finish()])
    attached = [each for each in checked.citations if each.is_attached]
    assert shown == checked.text or attached
    for text in (shown, checked.text):
        assert all(1 <= int(number) <= len(PASSAGES) for number in re.findall(r"\[\s*(\d{1,3})\s*\]", text))


def test_a_library_goes_from_question_to_checked_answer(tmp_path: Path) -> None:
    texts = ["\n\n".join(each.text for each in PASSAGES)]
    passages = [replace(each, id=number) for number, each in enumerate(PASSAGES)]
    write_texts(tmp_path, texts, passages)
    build_index(passages, "en").save(tmp_path / "index")
    library = Library.open(tmp_path)
    made = library.ground("Who is Yorick?", count_tokens=count_words, budget_tokens=400)
    assert isinstance(made, Grounding)
    assert [each.id for each in made.passages] == [1]
    checked = library.check('A fellow of "infinite jest" [1], "a king" [2].', made.passages)
    assert [(each.number, each.title) for each in checked.citations] == [(1, "Hamlet")]
    assert library.mark(checked, "Who is Yorick?") == (
        'A fellow of "infinite jest" [1], "a king" (not in these words in the passages).'
    )
    silent = library.ground("Bilgisayara yazıcı nasıl kurulur ve çalıştırılır?", count_tokens=len, budget_tokens=400)
    assert isinstance(silent, str)
    assert silent.startswith("Metinler")


def test_a_question_that_names_nothing_goes_on_with_the_last_that_does() -> None:
    library = Library(build_index(PASSAGES, "en"))
    before = ["Who is Yorick?", "Why?"]
    made = library.ground("Tell me more.", count_tokens=count_words, budget_tokens=400, before=before)
    assert isinstance(made, Grounding)
    assert made.passages[0].id == 9
    assert made.back == 2
    assert made.messages[-1]["content"].endswith("Who is Yorick?")
    assert isinstance(library.ground("Tell me more.", count_tokens=count_words, budget_tokens=400), str)
    absent = "How do I repair a carburettor?"
    assert isinstance(library.ground(absent, count_tokens=count_words, budget_tokens=400, before=before), str)


@pytest.mark.parametrize("language", ["en", "tr", "de", "fr"])
def test_what_a_report_goes_on_with_names_nothing(language: str) -> None:
    assert Terms(language).names_nothing(follow_up(language))
    assert not Terms(language).names_nothing(f"{follow_up(language)} Yorick")
