"""Tasks, settings and limits that are wrong are told in a sentence before any question is asked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.evaluate.evaluation_files import documents, write_lines
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.datasets import Library
from trimaran.runtime.evaluate.generation import check_settings, with_options
from trimaran.runtime.evaluate.options import EvaluationOptions, check_limit
from trimaran.runtime.evaluate.tasks.load import load_tasks

OWN: dict[str, Any] = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATES = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{q}}"}


def own_task(folder: Path, **changes: Any) -> Path:
    """Write a task of JSON, which is YAML, and its documents."""
    rows = [{"q": f"What is {number}?", "choices": ["a", "b"], "gold": number % 2} for number in range(4)]
    write_lines(folder / "rows.jsonl", rows)
    config = {key: value for key, value in {**OWN, **changes}.items() if value is not None}
    (folder / "own.yaml").write_text(json.dumps(config))
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "SecurityError: access to attribute '__class__'"),
        ({"doc_to_text": "{% for i in range(10 ** 9) %}{% endfor %}"}, "OverflowError: Range too big"),
        ({"doc_to_txt": "{{q}}"}, "doc_to_txt is no field of a task; did you mean doc_to_text"),
        ({"doc_to_text": None}, "needs the field doc_to_text"),
        ({"doc_to_target": None}, "needs the field doc_to_target"),
        ({"doc_to_choice": None}, "needs the field doc_to_choice"),
        ({"doc_to_target": "7"}, "of its first document, doc_to_target must be one of doc_to_choice"),
        ({"metric_list": "acc"}, "metric_list must be a list of records"),
        ({"metric_list": ["acc"]}, "metric_list must be a list of records"),
        ({"metric_list": [{"metric": "acc", "aggregation": "nix"}]}, "there is no aggregation nix; take one of .*mean"),
        ({"filter_list": "take_first"}, "filter_list must be a list of records"),
        ({"filter_list": [{"name": "f", "filter": ["take_first"]}]}, "filter_list.filter must be a list of records"),
        ({"process_results": "utils.f"}, "process_results must be a function, written !function"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"target_delimiter": 5}, "target_delimiter must be a text"),
        ({"test_split": "nix"}, r"test_split \(nix\) is no split of data_files, which has test"),
        ({**GENERATES, "generation_kwargs": [1]}, "generation_kwargs must be a record"),
        ({**GENERATES, "metric_list": [{"metric": "acc"}]}, "task own: a document can't be asked and judged: "),
        ({"num_fewshot": 4}, "begins with 4 examples, and there are 4 to draw from; give --num-fewshot 3 or less"),
    ],
)
def test_a_field_is_checked_before_it_could_fail_after_all_answers(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_tasks([str(own_task(tmp_path, **changes))])


def test_code_that_fails_on_answers_is_told_before_any_is_given(tmp_path: Path) -> None:
    path = own_task(tmp_path)
    (tmp_path / "mine.py").write_text("def judge(doc, results):\n    raise RuntimeError('boom')\n")
    path.write_text(path.read_text()[:-1] + ', "process_results": !function mine.judge}')
    with pytest.raises(DataError, match="task own: a document can't be asked and judged: RuntimeError: boom"):
        load_tasks([str(path)], allow_code=True)
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(DataError, match="needs the package no_such_package; install it, or leave the task out"):
        load_tasks([str(path)], allow_code=True)


def test_groups_have_tasks_of_their_own_but_not_themselves(tmp_path: Path) -> None:
    own_task(tmp_path)
    path = tmp_path / "group.yaml"
    path.write_text(json.dumps({"group": "g", "task": [OWN], "aggregate_metric_list": [{"metric": "acc"}]}))
    assert list(load_tasks([str(path)]).tasks) == ["own"]
    for members, message in (([], "has no task"), (["g"], "has itself among its tasks")):
        path.write_text(json.dumps({"group": "g", "task": members}))
        with pytest.raises(DataError, match=rf"the group g \(.*\) {message}"):
            load_tasks([str(path)])


def test_two_tasks_of_one_name_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "copa.jsonl", documents("copa")[1])
    with pytest.raises(DataError, match=r"two tasks have the name copa: those of .*default.yaml and .*own.yaml"):
        load_tasks(["copa", str(own_task(tmp_path, task="copa"))], tmp_path)


def test_names_are_found_in_any_case(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no task ARC_EASY; did you mean arc_easy"):
        load_tasks(["ARC_EASY"], tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1], "generation_kwargs must be a record of settings, and it is"),
        ({"max_gen_toks": "abc"}, "max_gen_toks must be a whole number, and it is 'abc'"),
        ({"max_gen_toks": 1.5}, "max_gen_toks must be a whole number"),
        ({"max_gen_toks": True}, "max_gen_toks must be a whole number"),
        ({"top_k": [1]}, "top_k must be a whole number"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"do_sample": "maybe"}, "do_sample must be true or false"),
        ({"until": 5}, "until must be a text or a list of texts"),
        ({"until": ["a", 5]}, "until must be a text or a list of texts"),
        ({"num_beams": 3}, "generation has no setting num_beams; take until, max_gen_toks"),
    ],
)
def test_settings_of_generation_have_their_types(settings: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"here: {message}"):
        check_settings(settings, "here")


def test_settings_that_would_have_no_effect_are_told() -> None:
    greedy = {"until": ["\n"], "do_sample": False, "temperature": 0.0}
    for asked in ({"temperature": 0.7}, {"top_k": 5}):
        with pytest.raises(DataError, match="has no effect where nothing is drawn; add --gen do_sample=true"):
            with_options(greedy, asked, "gsm8k")
    with pytest.raises(DataError, match="with do_sample=true nothing is drawn at temperature 0"):
        with_options(greedy, {"do_sample": True}, "gsm8k")
    asked = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 8.0, "top_k": None}
    assert with_options({**greedy, "max_new_tokens": 99}, asked, "gsm8k") == {
        "until": ["\n"], "do_sample": True, "temperature": 0.7, "max_gen_toks": 8,
    }  # fmt: skip
    assert with_options(None, {"temperature": 0.7}, "own") == {"temperature": 0.7}


def test_settings_are_for_tasks_that_generate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--gen is for tasks whose answers are generated, and .*own\.yaml has none"):
        load_tasks([str(own_task(tmp_path))], generation={"max_gen_toks": 4})


@pytest.mark.parametrize("limit", [0, -1, 1.5, math.nan, math.inf, 1e30])
def test_a_limit_is_a_number_of_documents_or_a_share(limit: float) -> None:
    with pytest.raises(ValueError, match=r"--limit \(.*\) must be a whole number of documents, or a share"):
        check_limit(limit)


def test_a_link_to_a_folder_above_itself_is_passed_over_and_half_a_character_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path)
    write_lines(tmp_path / "copa.jsonl", [{**documents("copa")[1][0], "query": "The \ud800 fell, because"}])
    with pytest.raises(DataError, match=r"copa.jsonl, line 1: query must be a text without half a surrogate pair"):
        Library(tmp_path).split("copa", "validation")


def test_every_option_that_changes_a_figure_is_in_the_name() -> None:
    options = [
        EvaluationOptions(texts=(Path("a.txt"),)),
        EvaluationOptions(texts=(Path("b.txt"),)),
        EvaluationOptions(tasks=("gsm8k",)),
        EvaluationOptions(tasks=("gsm8k",), system="Be brief."),
        EvaluationOptions(tasks=("gsm8k",), system="Be long."),
        EvaluationOptions(tasks=("gsm8k",), generation={"max_gen_toks": 4}),
        EvaluationOptions(tasks=("gsm8k",), seed=3),
        EvaluationOptions(tasks=("gsm8k",), chat=True),
    ]
    names = [each.name(10) for each in options]
    assert len(set(names)) == len(names)
    assert names[0] == "text-a-step-10"
    assert names[5] == "gsm8k-gen-max_gen_toks=4-step-10"
