"""Evaluation items are found in the corpus where 13 words, or a whole shorter item, are shared, and only there."""

import gzip
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runtime.evaluate import evaluation_files
from trimaran.runtime.data.decontaminate import Decontaminate, EvaluationSets, Hit, read_items, read_items_of_set
from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.recipe.steps import evaluation_sets
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection

DATA = Path(__file__).parents[4] / "shared" / "data"
QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
SHORT = "What is the boiling point of water?"
ITEMS = {"gsm": [QUESTION, ""], "short": [SHORT, "Which planet has the most moons of them all?"]}


def run(
    text: str, action: Literal["document", "paragraph"] = "document"
) -> tuple[Removal | None, str, Counts, list[Hit]]:
    """Return what the step makes of a text: its answer, the text afterwards, the counts and the hits."""
    step, document, counts = (
        Decontaminate(EvaluationSets.of_items(ITEMS), action),
        Document("web#1", text),
        Counter[str](),
    )
    removal = step(document, counts)
    return removal, document.text, counts, step.hits


def test_a_document_with_thirteen_words_of_an_item_is_removed_whatever_its_case_and_punctuation() -> None:
    copied = "she wrote: natalia SOLD clips \u2014 to 48 of her friends, in April; and then. He left."
    removal, text, _, hits = run(copied)
    passage = "natalia sold clips to 48 of her friends in april and then"
    assert removal is None  # twelve words
    copied = copied.replace("He left", "She left")
    removal, text, _, hits = run(copied)
    assert removal == Removal("decontaminate.ngram", f"item 1 of gsm: {passage} she")
    assert text == copied
    assert hits == [Hit("gsm", 1, "web#1", f"{passage} she")]


def test_an_item_of_fewer_words_is_found_as_a_whole() -> None:
    assert run("It asks: what is the boiling point of milk?")[0] is None
    removal, _, _, hits = run(f"It asks: {SHORT.upper()}")
    assert removal == Removal("decontaminate.short_item", "item 1 of short: what is the boiling point of water")
    assert hits[0].item == 1
    assert run("water")[0] is None
    assert run("")[0] is None


def test_paragraphs_that_a_passage_reaches_into_are_cut_and_the_others_stay_as_they_are() -> None:
    first, second = QUESTION[:54], QUESTION[54:]
    text = f"Before it.\n  indented\n\n{first}\n \n{second}\n\n\nAfter it.\n"
    removal, left, counts, hits = run(text, "paragraph")
    assert removal is None
    assert left == "Before it.\n  indented\n\nAfter it.\n"
    assert counts == {"decontaminate.paragraphs": 2, "decontaminate.bytes": len(text) - len(left)}
    assert len(hits) == 1
    assert run(f"{QUESTION}\n\n", "paragraph")[0] is not None
    assert run(f"A start.\n\n{SHORT}\n", "paragraph")[1] == "A start."
    lines = f"Before it.\n{first}\n{second}\nAfter it.\n"  # as C4's rules leave them
    assert run(lines, "paragraph")[1] == "Before it.\nAfter it.\n"
    assert run("Nothing of it.\n\nHere.", "paragraph")[:3] == (None, "Nothing of it.\n\nHere.", {})


def test_a_hash_that_only_looks_the_same_removes_nothing() -> None:
    """The words decide: the sets are given the hashes of the document's own words, under other words."""
    text = "these are some words of a document that no item has in this order ever"
    sets = EvaluationSets.of_items({"set": [text]})
    other = EvaluationSets.of_items({"set": [text.replace("words", "terms")]})
    forged = EvaluationSets(
        sets.names,
        sets.bounds,
        other.words,
        sets.length,
        sets.hashes,
        sets.firsts,
        sets.short,
        sets.bits,
        sets.openings,
    )
    assert Decontaminate(sets)(Document("a", text), Counter()) is not None
    assert Decontaminate(forged)(Document("a", text), Counter()) is None


def test_every_shared_run_is_found_and_no_other() -> None:
    """Against a set of tuples of words, over texts of few words that share much."""
    draw = random.Random(4)
    items = [" ".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(40)]
    for length in (2, 6):
        sets = EvaluationSets.of_items({"one": items[:15], "two": items[15:]}, length)
        wanted: dict[tuple[str, ...], set[int]] = {}
        for number, item in enumerate(items):
            words = item.split()
            for at in range(max(1, len(words) - length + 1)):
                wanted.setdefault(tuple(words[at : at + length]), set()).add(number)
        step = Decontaminate(pickle.loads(pickle.dumps(sets)))
        texts = [" ".join(draw.choices("abcdefg", k=draw.randint(0, 12))) for _ in range(200)]
        found = set()
        for text in texts:
            words = text.split()
            runs = [tuple(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)]
            shared = set().union(*(wanted.get(run, set()) for run in runs))
            found |= shared
            assert (step(Document("x", text), Counter()) is not None) == bool(shared), text
        assert {(hit.set, hit.item) for hit in step.hits} == {
            ("one", number + 1) if number < 15 else ("two", number - 14) for number in found
        }


def test_the_table_has_a_row_for_each_set() -> None:
    sets = EvaluationSets.of_items(ITEMS)
    first, second = Hit("short", 1, "b", "what"), Hit("short", 1, "c", "what")
    assert sets.table([first, second]) == {
        "gsm": {"items": 2, "without_words": 1, "short": 0, "found": []},
        "short": {"items": 2, "without_words": 0, "short": 2, "found": [first]},
    }


def write_sets(folder: Path) -> dict[str, list[str]]:
    """Write one set in every format; return the files with their fields."""
    rows: list[dict[str, Any]] = [
        {"question": 'Is it, "so"?', "choices": ["yes", "no"], "more": {"id": 3}},
        {"question": "And\nthis?", "choices": [], "more": {"id": None}},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (folder / "set.jsonl").write_text(lines)
    (folder / "set.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "set.csv").write_text('\ufeffquestion,choices,id\n"Is it, ""so""?",yes no,3\n"And\nthis?",,\n')
    pq.write_table(pa.Table.from_pylist(rows), folder / "set.parquet")
    nested = ["question", "choices", "more.id"]
    return {
        "set.jsonl": nested,
        "set.jsonl.gz": nested,
        "set.parquet": nested,
        "set.csv": ["question", "choices", "id"],
    }


def test_sets_of_every_format_give_the_same_items(tmp_path: Path) -> None:
    for name, fields in write_sets(tmp_path).items():
        assert [item.strip() for item in read_items(tmp_path / name, fields)] == [
            'Is it, "so"? yes no 3',
            "And\nthis?",
        ], name


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        (
            "a.jsonl",
            b'{"q": "x"}\n{"p": 1}',
            ["q"],
            r"a.jsonl, line 2 has no field 'q'; name those of its text \(p\)",
        ),
        ("a.jsonl", b'{"q": "x"}\n{', ["q"], "a.jsonl as .jsonl: line 2 is not JSON"),
        ("a.jsonl", b'["x"]', ["q"], "line 1 has no field 'q'"),
        ("a.jsonl", b'{"q": "\xff"}', ["q"], "a.jsonl as .jsonl: .*codec can't decode"),
        ("a.csv", b"q\nx\n", ["r"], "has no field 'r'"),
        ("a.csv", b'q\n"x', ["q"], "a.csv as .csv: unexpected end"),
        ("a.jsonl.gz", b"no gzip", ["q"], "a.jsonl.gz as .jsonl: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"q": "x"}', mtime=0)[:-4], ["q"], "ended before the end-of-stream"),
        ("a.parquet", b"PAR1", ["q"], "a.parquet as .parquet"),
        ("a.txt", b"x", ["q"], "no evaluation set of a known kind"),
    ],
)
def test_a_set_that_is_none_is_a_sentence(
    name: str, content: bytes, fields: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / name, fields)


def test_a_set_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.jsonl; name one that is there"):
        read_items(tmp_path / "none.jsonl", ["q"])


def test_a_set_that_evaluation_knows_is_found_by_its_name(tmp_path: Path) -> None:
    """Question and answers of each document are an item, also where the file is flat."""
    evaluation_files.write_sets(tmp_path)
    section = DecontaminateSection.model_validate(
        {"against": [{"set": name, "file": str(tmp_path)} for name in ("gsm8k", "winogrande", "mmlu")]}
    )
    sets = evaluation_sets(section)
    assert sets.names == tuple(f"{name} of {tmp_path}" for name in ("gsm8k", "winogrande", "mmlu"))
    assert np.diff(sets.bounds).tolist() == [12, 12, 12]
    schema = evaluation_files.documents("winogrande")[0][4]
    text = schema["sentence"].replace("_", schema[f"option{schema['answer']}"])
    step, document = Decontaminate(sets), Document("web#1", f"She said: {text} It is so.")
    assert step(document, Counter()) is not None
    assert {(hit.set, hit.item) for hit in step.hits} == {(sets.names[1], 5)}
    with pytest.raises(DataError, match=r"decontaminate.against: the validation split of boolq is missing"):
        read_items_of_set("boolq", tmp_path / "gsm8k")


REAL = {
    "gsm8k/test.jsonl": ["question", "answer"],
    "mmlu/dev.jsonl": ["question", "choices"],
    "arc-and-friends/arc_easy.jsonl": ["query"],
    "truthfulqa/TruthfulQA.csv": ["Question"],
}


def test_real_items_are_found_in_text_that_quotes_them() -> None:
    """Of the evaluation sets on this host, where they are: some of each, each quoted in a document of its own."""
    read = {name: read_items(DATA / name, fields)[::40] for name, fields in REAL.items() if (DATA / name).exists()}
    items = {"generated": [f"{QUESTION} Answer {number} follows here." for number in range(30)], **read}
    sets = EvaluationSets.of_items(items)
    step = Decontaminate(sets)
    for name, texts in items.items():
        for number, text in enumerate(texts):
            document = Document(f"{name}#{number}", f"Somebody wrote: {text.upper()}\nThat was it.")
            assert step(document, Counter()) is not None, text
    table = sets.table(step.hits)
    print({name: (row["items"], row["short"], len(row["found"])) for name, row in table.items()})
    assert all(len(row["found"]) == row["items"] - row["without_words"] for row in table.values())
    assert (
        step(Document("clean", "Nothing of the kind was ever asked by anyone in this text, nor answered."), Counter())
        is None
    )
    assert np.all(np.diff(sets.hashes.astype(object)) >= 0)
