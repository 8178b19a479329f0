"""The index finds what the texts speak of, is silent on the rest, has nothing held out, and is read without pickle."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.twin.plays import plays
from trimaran.runtime.data.files import DataError
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.absent import absent_questions
from trimaran.runtime.twin.retrieval.index import Index, Silence
from trimaran.runtime.twin.retrieval.masked import make_queries, without_sentences
from trimaran.runtime.twin.retrieval.phrases import silent_answer
from trimaran.runtime.twin.retrieval.silence import LEAST_QUESTIONS, REFUSED, STANDARD, build_index, coverages
from trimaran.runtime.twin.retrieval.terms import Terms
from trimaran.runtime.twin.texts.passages import make_passages
from trimaran.runtime.twin.texts.read import read_works


@cache
def shakespeare() -> tuple[Passage, ...]:
    """Return the passages of five plays, one of them held out."""
    works = read_works(plays("hamlet", "macbeth", "the-tempest", "twelfth-night", "richard-iii"), "en")
    return make_passages(works.works, "en").passages


@cache
def index() -> Index:
    return build_index(shakespeare(), "en")


def passage(number: int, text: str, *, is_held_out: bool = False) -> Passage:
    return Passage(number, 0, "a.txt", "Title", "Chapter", 0, len(text), 1, 1 + text.count("\n"), text, is_held_out)


def test_masked_sentences_find_their_passage_among_the_first_five() -> None:
    queries = make_queries(shakespeare(), index().terms, 200)
    held = {each.id for each in shakespeare() if each.is_held_out}
    assert len(queries) == 200
    assert held.isdisjoint(each.passage for each in queries)
    found = [any(hit.passage.id == each.passage for hit in index().search(each.query, 5)) for each in queries]
    assert np.mean(found) >= 0.9
    removed = make_queries(shakespeare(), index().terms, 50, share=1.0)
    without = Index.build(without_sentences(shakespeare(), removed), "en")
    hits = [any(hit.passage.id == each.passage for hit in without.rank(each.query, 5)) for each in removed]
    assert np.mean(hits) < np.mean(found)  # a sentence that is gone is found by its neighbours alone


def test_held_out_passages_are_never_found() -> None:
    held = [each for each in shakespeare() if each.is_held_out]
    assert held
    for each in held[:20]:
        assert not any(hit.passage.is_held_out for hit in index().rank(each.text[:200], 20))


def test_the_threshold_of_silence_is_measured_and_absent_topics_are_refused() -> None:
    silence = index().silence
    assert silence.absent >= LEAST_QUESTIONS
    assert silence.refused >= REFUSED
    assert silence.kept >= 0.95
    questions = absent_questions("en", index().says)
    assert sum(each < silence.threshold for each in coverages(index(), questions)) / len(questions) == silence.refused
    # The threshold is no higher than it has to be: the next lower coverage would refuse too few.
    lower = max(each for each in coverages(index(), questions) if each < silence.threshold)
    assert sum(each < lower for each in coverages(index(), questions)) / len(questions) < REFUSED
    assert index().search("How do I configure a TCP socket in Linux?") == ()
    assert index().search("") == ()
    assert index().search("Who is Yorick?")[0].passage.title == "Hamlet"


def test_a_language_without_questions_has_the_standard_threshold() -> None:
    built = build_index([passage(0, "Der Müller mahlt das Korn am Morgen und geht am Abend nach Hause.")], "de")
    assert built.silence == Silence(STANDARD, 0, 0.0, built.silence.present, 1.0)


def test_scores_are_those_of_the_formula() -> None:
    texts = ["cat dog", "cat cat bird fish", "bird tree tree", "stone"]
    built = Index.build([replace(passage(n, text), title="", chapter="") for n, text in enumerate(texts)], "en")
    lengths = [2, 4, 3, 1]

    def bm25(term: str, number: int) -> float:
        count = texts[number].split().count(term)
        documents = sum(term in text.split() for text in texts)
        idf = np.log(1 + (4 - documents + 0.5) / (documents + 0.5))
        return float(idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * lengths[number] / np.mean(lengths))))

    found = built.rank("bird and a cat?", 4)
    wanted = {n: bm25("cat", n) + bm25("bird", n) for n in range(3)}
    assert {each.passage.id: each.score for each in found} == pytest.approx(wanted, rel=1e-5)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert {each.passage.id: each.coverage for each in found} == pytest.approx({0: 0.5, 1: 1.0, 2: 0.5})
    half = built.rank("bird unicorn", 1)[0].coverage
    assert half == pytest.approx(built.rarity("bird") / (built.rarity("bird") + built.rarity("unicorn")))


def test_equal_passages_come_in_their_order_and_k_may_be_more_than_there_are() -> None:
    built = Index.build([passage(n, "the same words of a mill") for n in range(7)], "en")
    assert [each.passage.id for each in built.rank("mill", 3)] == [0, 1, 2]
    assert [each.passage.id for each in built.rank("mill", 100)] == list(range(7))
    assert built.rank("mill", 0) == ()


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("tr", "IŞIK İstanbul'da; Ahmet’in", ["ışık", "istanbul", "ahmet"]),
        ("en", "The king's o'er ISTANBUL", ["the", "king", "oer", "istanbul"]),
        ("fr", "L'homme d’État", ["l", "homme", "d", "état"]),
        ("ja", "吾輩は猫", ["吾", "輩", "は", "猫"]),
    ],
)
def test_words_are_those_of_the_language(language: str, text: str, words: list[str]) -> None:
    assert Terms(language).words(text) == words


def test_turkish_questions_find_turkish_texts_in_any_case() -> None:
    texts = ["Işık köyün üstüne düştü, ihtiyar değirmenci kapıyı açtı.", "Irmağın suyu soğuktu; çocuklar bekledi."]
    built = Index.build([passage(n, text) for n, text in enumerate(texts)], "tr")
    assert [each.passage.id for each in built.rank("IŞIK NEREYE DÜŞTÜ?")] == [0]
    assert [each.passage.id for each in built.rank("IRMAK nasıldı, ırmağın suyu?")] == [1]
    assert built.rank("ırmak")[0].passage.id == 1  # by its stem
    assert len(absent_questions("tr", built.says)) >= 55
    assert built.says("IHTIYAR DEGIRMENCI") is False
    assert built.says("İHTİYAR DEĞİRMENCİ")
    assert not built.says("değirmenci ihtiyar")
    assert not built.says("bu")


def test_a_saved_index_is_the_same_and_holds_no_pickle(tmp_path: Path) -> None:
    index().save(tmp_path)
    loaded = Index.load(tmp_path, shakespeare())
    assert loaded.silence == index().silence
    for question in ("Who is Yorick?", "What is a crown worth?", "the internet"):
        assert loaded.search(question) == index().search(question)
    for file in tmp_path.iterdir():
        assert file.suffix in (".json", ".npy")
        if file.suffix == ".npy":
            assert np.load(file, allow_pickle=False).dtype.kind in "fi"
        else:
            json.loads(file.read_text(encoding="utf-8"))


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def change(folder: Path, name: str, **values: object) -> None:
    own = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**own, **values}), encoding="utf-8")


def damage(folder: Path, what: str) -> None:
    numbers = folder / "indices.csc.index.npy"
    if what == "pickle":
        numbers.write_bytes(pickle.dumps(Trap(folder / "ran")))
    elif what == "object array":
        np.save(numbers, np.array([Trap(folder / "ran")], dtype=object), allow_pickle=True)
    elif what == "number beyond":
        np.save(numbers, np.load(numbers) + 10_000)
    elif what == "missing":
        numbers.unlink()
    elif what == "held out":
        held = next(each.id for each in shakespeare() if each.is_held_out)
        change(folder, "index.json", passages=[held, *[each.id for each in index().passages][1:]])
    elif what == "version":
        change(folder, "index.json", version=0)
    elif what == "vocabulary":
        change(folder, "vocab.index.json", crown=0)
    elif what == "count":
        change(folder, "params.index.json", num_docs=3)
    else:
        (folder / "index.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize(
    "what",
    ["pickle", "object array", "number beyond", "missing", "held out", "version", "vocabulary", "count", "no record"],
)
def test_a_damaged_index_is_refused_and_runs_nothing(tmp_path: Path, what: str) -> None:
    index().save(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(DataError, match="build"):
        Index.load(tmp_path, shakespeare())
    assert not (tmp_path / "ran").exists()


def test_an_index_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 0 passages"):
        Index.build([passage(0, "all of it is held out", is_held_out=True)], "en")


@pytest.mark.parametrize(
    ("question", "start"),
    [
        ("How do I configure a TCP socket?", "The texts are silent"),
        ("Bilgisayara yazıcı nasıl kurulur ve çalıştırılır?", "Metinler bu konuda susuyor"),
        ("Wie wird eigentlich Kunststoff hergestellt?", "Die Texte schweigen"),
        ("xyzzy", "The texts are silent"),
    ],
)
def test_silence_is_told_in_the_language_of_the_question(question: str, start: str) -> None:
    assert silent_answer(question, "en").startswith(start)


def test_silence_in_a_language_that_can_t_be_told_is_that_of_the_texts() -> None:
    assert silent_answer("xyzzy", "tr").startswith("Metinler")
