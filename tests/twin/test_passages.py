"""Passages are exact pieces of their works, and nothing of the held-out part is in the training part."""

import json
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.twin.books import novel, prose
from trimaran.runtime.data.files import DataError
from trimaran.runtime.twin.passages import Passage, read_passages, work_file, write_texts
from trimaran.runtime.twin.texts.passages import MOST_WORDS, Passages, _cut, count_words, make_passages
from trimaran.runtime.twin.texts.read import assemble
from trimaran.runtime.twin.texts.work import Block, Chapter, Work


def work_of(number: int, blocks: list[Block]) -> Work:
    text, chapters = assemble(blocks)
    return Work(number, f"{number}.txt", f"Work {number}", "", "en", text, chapters)


def novels(count: int, chapters: int = 4, paragraphs: int = 8) -> list[Work]:
    """Return novels whose paragraphs no other has."""
    return [
        work_of(
            number,
            [
                block
                for place in range(chapters)
                for block in (
                    Block(f"Chapter {place}", 2),
                    *map(Block, prose(1000 * number + place, paragraphs, sentences=4)),
                )
            ],
        )
        for number in range(count)
    ]


def check(works: list[Work], made: Passages) -> None:
    """Every passage is what its record says, in order, apart from the next, inside one chapter."""
    texts = {work.number: work for work in works}
    at = (-1, 0)
    for number, each in enumerate(made.passages):
        work = texts[each.work]
        assert each.id == number
        assert each.text == work.text[each.start : each.end] == each.text.strip()
        assert "\n".join(work.text.split("\n")[each.first_line - 1 : each.last_line]).find(each.text) >= 0
        assert work.text.count("\n", 0, each.end) + 1 == each.last_line
        assert (each.file, each.title) == (work.file, work.title)
        assert any(c.start <= each.start and each.end <= c.end and c.title == each.chapter for c in work.chapters)
        assert at <= (each.work, each.start)
        at = (each.work, each.end)


words = st.text(alphabet="abç ı.!?\n", min_size=1, max_size=60)
paragraphs = words.map(lambda text: "\n".join(line.strip() for line in text.split("\n") if line.strip()))
blocks = st.lists(
    st.one_of(
        paragraphs.filter(bool).map(lambda text: Block(text)),
        st.integers(1, 4).map(lambda level: Block(f"Heading {level}", level)),
        st.integers(1, 900).map(lambda count: Block("word " * (count - 1) + "end.")),
        st.integers(1, 90).map(lambda count: Block("A sentence of seven words is here. " * (count - 1) + "End.")),
        st.integers(1, 90).map(lambda count: Block("\n".join(["A line of some more words"] * count))),
    ),
    min_size=1,
    max_size=12,
)


@given(st.lists(blocks, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_passage_is_exactly_the_characters_and_lines_that_it_names(sources: list[list[Block]]) -> None:
    works = [work_of(number, each) for number, each in enumerate(sources)]
    works = [each for each in works if each.chapters]
    made = make_passages(works, "en")
    check(works, made)
    left = sum(each.times for each in made.left if each.reason == "passage.copy")
    for work in works if not left else []:
        covered = "".join(each.text for each in made.passages if each.work == work.number)
        wanted = "".join(work.text[chapter.start : chapter.end] for chapter in work.chapters)
        assert "".join(covered.split()) == "".join(wanted.split())


def test_passages_are_about_200_words_of_whole_paragraphs() -> None:
    works = novels(3, paragraphs=20)
    made = make_passages(works, "en")
    counts = [count_words(each.text) for each in made.passages]
    assert all(120 <= count <= MOST_WORDS + 60 for count in counts)
    assert 180 <= sum(counts) / len(counts) <= 220
    paragraph_ends = {work.number: {len(work.text)} | {
        place for place in range(len(work.text)) if work.text.startswith("\n\n", place)
    } for work in works}  # fmt: skip
    assert all(each.end in paragraph_ends[each.work] for each in made.passages)


def test_long_paragraphs_are_cut_at_lines_else_sentences_else_words() -> None:
    lines = "\n".join(f"line {n} has five words" for n in range(200))
    sentences = " ".join(f"Sentence {n} has five words." for n in range(200))
    plain = " ".join(f"w{n}" for n in range(1000))
    for text, end in ((lines, "words"), (sentences, "words."), (plain, "")):
        made = make_passages([work_of(0, [Block(text)])], "en")
        assert [each.text for each in made.passages][-1].endswith(text[-3:])
        assert len(made.passages) == 5
        assert all(each.text.endswith(end) for each in made.passages)
        check([work_of(0, [Block(text)])], made)


@pytest.mark.parametrize(
    "sign", ["a", "_", "\U0001f600", "e\u0301", "\U0001f1f9\U0001f1f7", "\U0001f469\u200d\U0001f9b0"]
)
def test_a_text_without_a_space_is_cut_between_what_is_read_as_one_character(sign: str) -> None:
    text = sign * 5_000
    (work,) = works = [work_of(0, [Block(text), Block("The end of it.")])]
    passages = [work.text[start:end] for start, end in _cut(work.text, work.chapters[0])]
    assert max(map(len, passages)) <= (MOST_WORDS + 60) * 16 * len(sign)
    assert "".join(passages).replace("\n", "") == text + "The end of it."
    characters = [character for each in passages for character in regex.findall(r"\X", each)]
    assert characters == regex.findall(r"\X", "".join(passages)), "no character is parted"
    check(works, make_passages(works, "en"))


def test_whole_works_are_held_out_where_there_are_several() -> None:
    works = novels(12)
    made = make_passages(works, "en")
    assert made.how == "works"
    held = {each.work for each in made.passages if each.is_held_out}
    assert held.isdisjoint(each.work for each in made.passages if not each.is_held_out)
    share = sum(len(each.text) for each in made.passages if each.is_held_out) / sum(len(w.text) for w in works)
    assert 0.08 <= share <= 0.2
    assert made == make_passages(works, "en")
    assert len(made.held_out) == len(held)


def test_whole_chapters_of_a_single_work_are_held_out() -> None:
    (work,) = novels(1, chapters=10)
    made = make_passages([work], "en")
    assert made.how == "chapters"
    held = {each.chapter for each in made.passages if each.is_held_out}
    assert held
    assert held.isdisjoint(each.chapter for each in made.passages if not each.is_held_out)


def test_the_end_of_a_text_without_chapters_is_held_out_and_of_one_passage_nothing() -> None:
    made = make_passages([work_of(0, [Block(text) for text in prose(0, 60, 4)])], "en")
    assert made.how == "end"
    flags = [each.is_held_out for each in made.passages]
    assert flags == sorted(flags)
    assert 0.05 <= sum(flags) / len(flags) <= 0.2
    single = make_passages([work_of(0, [Block("Only a few words.")])], "en")
    assert (single.how, [each.is_held_out for each in single.passages]) == ("nothing", [False])


def test_nothing_of_the_held_out_part_stays_in_training() -> None:
    works = novels(12)
    held = next(each for each in make_passages(works, "en").passages if each.is_held_out)
    quoting = work_of(99, [Block("My notes.\n" + held.text[: len(held.text) // 2]), *map(Block, prose(78, 40, 4))])
    made = make_passages([*works, quoting], "en")
    assert not any("Work 99" in name for name in made.held_out)
    mine = [each for each in made.passages if each.work == 99]
    assert [each for each in mine if held.text[:100] in each.text]
    assert all(each.is_held_out for each in mine if held.text[:100] in each.text)
    assert [(each.file, each.reason) for each in made.left] == [("99.txt", "passage.like_held_out")]
    training = "\n".join(each.text for each in made.passages if not each.is_held_out)
    for each in made.passages:
        if each.is_held_out and each.work != 99:
            assert not any(sentence in training for sentence in each.text.split(". "))


def test_a_passage_that_comes_twice_is_there_once() -> None:
    works = novels(5)
    twice = work_of(9, [Block("Again", 1), *(Block(text) for text in works[0].text.split("\n\n")[1:5])])
    made = make_passages([*works, twice], "en")
    assert [(each.file, each.reason) for each in made.left if each.reason == "passage.copy"] == [
        ("9.txt", "passage.copy")
    ]


def test_passages_and_works_are_read_as_they_were_written(tmp_path: Path) -> None:
    works = novels(3)
    made = make_passages(works, "en")
    write_texts(tmp_path, [work.text for work in works], made.passages)
    assert tuple(read_passages(tmp_path)) == made.passages
    for each in made.passages:
        assert work_file(tmp_path, each.work).read_text(encoding="utf-8")[each.start : each.end] == each.text


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "null", '{"id": 0}', '{"id": "0"}',
        json.dumps(dict.fromkeys(Passage.__slots__, 0)),
        json.dumps({name: 0 if name in ("id", "work", "start", "end", "first_line", "last_line") else "x"
                    for name in Passage.__slots__} | {"is_held_out": 1}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_passage_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "passages.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"passages\.jsonl:1: it is no passage"):
        read_passages(tmp_path)


def test_chapters_join_their_headings() -> None:
    text, chapters = assemble(
        [Block("Before."), Block("ACT I", 2), Block("SCENE I", 3), Block("One."), Block("SCENE II", 3), Block("Two."),
         Block("ACT II", 2), Block("Three.")]
    )  # fmt: skip
    assert [(chapter.title, text[chapter.start : chapter.end]) for chapter in chapters] == [
        ("", "Before."), ("ACT I, SCENE I", "One."), ("ACT I, SCENE II", "Two."), ("ACT II", "Three."),
    ]  # fmt: skip
    assert isinstance(chapters[0], Chapter)
    assert novel(0).startswith("CHAPTER I")
