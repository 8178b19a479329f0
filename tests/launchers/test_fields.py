"""`trimaran fields`: every field of a spec in words, and the page that is written by it."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimaran.launchers.cli.app import app
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.names import known_paths, place_of
from trimaran.runtime.spec.reference import fields_in, sections

PAGE = Path(__file__).parents[2] / "docs" / "spec.md"


def fields(*words: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["fields", *words], env={"COLUMNS": "100", **environment})


def test_the_page_of_fields_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fields("--markdown").stdout == page, "write it: trimaran fields --markdown > docs/spec.md"
    missing = [
        path
        for path in known_paths()
        if f"`{path}`" not in page and not place_of(path).is_section  # type: ignore[union-attr]
    ]
    assert not missing


def test_every_section_is_listed_with_its_fields() -> None:
    assert [name for name, _, _ in sections()] == list(RunFields.model_fields)
    shown = fields().stdout
    assert all(f"{name} " in shown and description in shown for name, description, _ in sections())
    of_parallel = fields("parallel").stdout
    assert [line.split()[0] for line in of_parallel.splitlines()[1:]] == [each.path for each in fields_in("parallel")]


@pytest.mark.parametrize(
    ("path", "kind", "default", "rule"),
    [
        ("parallel.tp", "whole number", "1", "at least 1; checked together with model.hidden_size"),
        ("optimizer.lr", "number", "required", "above 0"),
        ("optimizer.betas", "list of numbers", "[0.9, 0.95]", "2 items; each at least 0 and below 1"),
        ("data.filter.gopher", "true, false, a section or null", "null", ""),
        ("evaluation.batch_size", "whole number or auto", '"auto"', "at least 1"),
        ("precision.dtype", "float32, bfloat16 or float64", '"float32"', ""),
        ("seed", "whole number", "1234", "at least 0"),
    ],
)
def test_a_field_is_told_in_words(path: str, kind: str, default: str, rule: str) -> None:
    (found, *_) = fields_in(path)
    assert (found.path, found.kind, found.default) == (path, kind, default)
    assert found.rule.startswith(rule)
    assert found.description in " ".join(fields(path).stdout.split())


@pytest.mark.parametrize(
    ("path", "of_all"),
    [
        ("data.corpora.web.weight", "data.corpora.NAME.weight"),
        ("data.stages[3].tokens", "data.stages[N].tokens"),
        ("data.stages[0].weights.web", "data.stages[N].weights"),
    ],
)
def test_an_item_is_told_as_every_item(path: str, of_all: str) -> None:
    assert [each.path for each in fields_in(path)] == [of_all]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimiser"], "a spec has no section or field 'optimiser'; did you mean optimizer?"),
        (["parallel.tpp"], "a spec has no section or field 'parallel.tpp'; did you mean parallel.tp?"),
        (["learning_rate"], "a spec has no section or field 'learning_rate'; did you mean optimizer.lr?"),
        (["qqqqq"], "a spec has no section or field 'qqqqq'; the sections are model, parallel,"),
        ([" "], "a spec has no section or field ''; the sections are model"),
        (["seed", "--markdown"], "--markdown prints the page of all fields; leave seed out, or --markdown"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(words: list[str], sentence: str) -> None:
    result = fields(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
