"""Evaluation sets are found by the names of files and folders, read from every format, and checked field by field."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runtime.evaluate.evaluation_files import PLACES, SUBJECTS, Documents, documents, write_lines
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.datasets import SETS, Library, read_item_texts

DATA = Path(__file__).parents[4] / "shared" / "data"


def rows_of(folder: Path, name: str, split: str | None = None) -> Sequence[dict[str, Any]]:
    """Return the documents of a set in a folder, of all groups."""
    groups = Library(folder).split(name, split or SETS[name].split).groups
    return [row for rows in groups.values() for row in rows]


def as_csv(rows: Documents) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    packed = (list, dict)
    writer.writerows([{k: json.dumps(v) if isinstance(v, packed) else v for k, v in row.items()} for row in rows])
    return text.getvalue().encode()


def as_parquet(rows: Documents) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_lines(rows: Documents) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


FORMATS: dict[str, Callable[[Documents], bytes]] = {
    ".json": lambda rows: json.dumps(rows).encode(),
    ".jsonl": as_lines,
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    ".csv": as_csv,
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("name", SETS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    rows, flat = documents(name)
    stem = PLACES[name][0].partition(".json")[0]
    found = []
    for number, (suffix, write) in enumerate(FORMATS.items()):
        for kind, records in (("published", rows), ("flat", flat)):
            path = tmp_path / f"{kind}{number}" / f"{stem}{suffix}"
            path.parent.mkdir(parents=True)
            if records:
                path.write_bytes(write(records))
                found.append((kind, rows_of(tmp_path / f"{kind}{number}", name)))
    for kind in ("published", "flat"):
        same = [each for of, each in found if of == kind]
        assert all(each == same[0] for each in same), kind
    assert len(found[0][1]) == len(rows)


@pytest.mark.parametrize(
    ("place", "name", "split"),
    [
        ("ai2_arc/ARC-Easy/test-00000-of-00001.parquet", "arc_easy", "test"),
        (
            "datasets--allenai--ai2_arc/snapshots/12ab/ARC-Challenge/train-00000-of-00001.parquet",
            "arc_challenge",
            "train",
        ),
        ("datasets--Rowan--hellaswag/snapshots/12ab/data/validation-00000-of-00001.parquet", "hellaswag", "validation"),
        ("hellaswag_val.jsonl", "hellaswag", "validation"),
        ("gsm8k/main/test.parquet", "gsm8k", "test"),
        ("super_glue/copa/validation.jsonl", "copa", "validation"),
        ("BoolQ/dev.jsonl", "boolq", "validation"),
        ("lambada_test_en.jsonl", "lambada", "test"),
        ("mmlu/all/dev-00000-of-00001.parquet", "mmlu", "dev"),
        ("arc-and-friends/openbook_qa.jsonl", "openbookqa", "test"),
    ],
)
def test_files_are_known_by_their_name_and_their_folders(place: str, name: str, split: str, tmp_path: Path) -> None:
    rows = documents(name)[0]
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(FORMATS[path.suffix](rows))
    write_lines(tmp_path / "other" / "test.jsonl", [{"text": "another set"}])
    write_lines(tmp_path / "gsm8k" / "socratic" / "test.jsonl", [{"text": "another configuration"}])
    assert len(rows_of(tmp_path, name, split)) == len(rows)


def test_shards_are_one_file_and_subjects_may_have_a_file_each(tmp_path: Path) -> None:
    rows = documents("arc_easy")[0]
    for number in (1, 0):
        write_lines(tmp_path / "arc_easy" / f"test-0000{number}-of-00002.jsonl", rows[number * 6 : number * 6 + 6])
    assert [row["question"] for row in rows_of(tmp_path, "arc_easy")] == [row["question"] for row in rows]
    questions = documents("mmlu")[0]
    for subject in SUBJECTS:
        own = [row for row in questions if row["subject"] == subject]
        text = io.StringIO()
        csv.writer(text).writerows([[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in own])
        path = tmp_path / "data" / "test" / f"{subject}_test.csv"  # as Hendrycks et al. published it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.getvalue())
    groups = Library(tmp_path).split("mmlu", "test").groups
    assert sorted(groups) == sorted(SUBJECTS)
    assert groups["anatomy"][0] == {key: questions[0][key] for key in ("question", "choices", "answer")}


WRONG = [
    ("arc_easy", {"answerKey": "E"}, r'line 2: answerKey must be one of A, B, C, D, and it is "E"'),
    ("arc_easy", {"choices": ["a", "b"]}, r"line 2: choices must be a record of the lists text and label"),
    ("arc_easy", {"choices": None}, r"line 2: choices must be a record"),
    ("hellaswag", {"label": "4"}, r'line 2: label must be a whole number from 0 to 3, and it is "4"'),
    ("hellaswag", {"label": ""}, r'line 2: label must be a whole number from 0 to 3, and it is ""'),
    ("hellaswag", {"endings": ["a", ""]}, r"endings must be a list of texts none of which is empty: nothing would be"),
    ("mmlu", {"answer": 4}, r"answer must be a whole number from 0 to 3, and it is 4"),
    ("mmlu", {"subject": "cooking"}, r'subject must be one of abstract_algebra, .*, and it is "cooking"'),
    ("mmlu", {"choices": ["a", "b", "c"]}, r"choices must be a list of at least 4 texts"),
    ("truthfulqa", {"mc1_targets": {"choices": ["a"], "labels": [0]}}, r"mc1_targets must be answers of which one is"),
    ("lambada", {"text": "ends in a space "}, r"text must be two words at least, with none after the last"),
    ("piqa", {"label": 1.5}, r"label must be a whole number from 0 to 1, and it is 1.5"),
    ("piqa", {"goal": 3}, r"goal must be a text, and it is 3"),
    ("winogrande", {"sentence": "no blank"}, r"sentence must be a text with a blank \(_\) and words after it"),
    ("winogrande", {"answer": "3"}, r"answer must be one of 1, 2"),
    ("wsc273", {"pronoun_loc": 500}, r"pronoun_loc must be a whole number from 0 to"),
    ("wsc", {"span2_index": -1}, r"span2_index must be a whole number"),
    ("copa", {"question": "why"}, r'question must be one of cause, effect, and it is "why"'),
    ("gsm8k", {"answer": "7"}, r"answer must be a text that ends with #### and the number"),
    ("boolq", {"passage": " "}, r"passage must be a text of at least one character that is no white space"),
]
WRONG_FLAT = [
    ("arc_easy", {"gold": 4}, r"line 2: gold must be a whole number from 0 to 3, and it is 4"),
    ("arc_easy", {"choices": ["a"]}, r"choices must be a list of at least 2 texts"),
    ("boolq", {"query": "no question"}, r"query must be a passage and, on a line of its own, Question: ..."),
    ("boolq", {"choices": ["yes", "maybe"]}, r"choices must be no and yes"),
    ("copa", {"query": "He left."}, r"query must be a sentence that ends with because or therefore"),
    ("hellaswag", {"query": "no activity"}, r"query must be an activity and a context"),
    ("lambada", {"continuation": "two words"}, r"continuation must be one word"),
    ("winogrande", {"context_options": ["a"]}, r"context_options must be a list of at least 2 texts"),
    ("wsc", {"query": "Passage: x"}, r"query must be as the task writes it"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG + WRONG_FLAT)
def test_a_wrong_field_is_named_with_its_file_line_and_value(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    published, flat = documents(name)
    rows = flat if (name, change, message) in WRONG_FLAT else published
    path = write_lines(tmp_path / PLACES[name][0], [rows[0], {**rows[1], **change}])
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path, name)
    assert str(caught.value).startswith(f"{path}, ")


def test_what_is_missing_is_told_with_the_names_and_fields_that_are_wanted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "hellaswag" / "val.jsonl", [{"query": "a: b", "choices": ["a", "b"]}])
    with pytest.raises(
        DataError, match=r"val.jsonl, line 1 has no field 'endings' \(it has query, choices\); hellaswag "
    ):
        rows_of(tmp_path, "hellaswag")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, "boolq")
    assert str(caught.value) == (
        "the validation split of boolq is missing: a file boolq/validation, boolq_validation or boolq (.json, .jsonl, "
        f".csv, .parquet, or .gz of one); looked for one in {tmp_path} and below (it has hellaswag/val.jsonl); boolq "
        "takes the fields passage, question, label (as published), or flat: query, choices, gold"
    )
    write_lines(tmp_path / "winograd_wsc.jsonl", documents("wsc273")[1])
    with pytest.raises(DataError, match=r"winograd_wsc, context_options\) are the task wsc273, this is SuperGLUE's"):
        rows_of(tmp_path, "wsc")
    write_lines(tmp_path / "hellaswag_val.jsonl", documents("hellaswag")[0])
    with pytest.raises(DataError, match=r"could both be the validation split of hellaswag; leave one of them there"):
        rows_of(tmp_path, "hellaswag")
    path.write_text("")
    (tmp_path / "hellaswag_val.jsonl").unlink()
    with pytest.raises(DataError, match=r"val.jsonl has no record; hellaswag takes the fields"):
        rows_of(tmp_path, "hellaswag")
    with pytest.raises(DataError, match=r"there is no folder .*/none; name the one that has the evaluation sets"):
        rows_of(tmp_path / "none", "hellaswag")


def test_the_real_sets_are_read_whole_where_they_are() -> None:
    """Of this host's folder of sets, if there is one: mosaicml's and other flat files, gsm8k as published."""
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "mmlu": 14042, "truthfulqa": 790}
    counts |= {"lambada": 5153, "piqa": 1838, "winogrande": 1267, "wsc273": 273, "boolq": 3270, "openbookqa": 500}
    counts |= {"copa": 100, "gsm8k": 1319}
    if not DATA.is_dir():
        return
    library = Library(DATA)
    for name, count in counts.items():
        groups = library.split(name, SETS[name].split).groups
        assert sum(map(len, groups.values())) == count, name
    rows = library.split("hellaswag", "validation").groups[""]
    # The sentences of ActivityNet, 3,243 of the validation split, are those that go on in the endings.
    assert sum(row["ctx_b"] != "" for row in rows) == 3243
    assert next(iter(read_item_texts("winogrande", DATA))).startswith(
        "Sarah was a much better surgeon than Maria so Maria"
    )
