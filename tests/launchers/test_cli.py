"""The commands that start no rank: check, schema, and what every command says to a wrong argument."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launchers.runs import make_workplace, trimaran


def test_check_prints_the_resolved_run_and_starts_nothing(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 2, "pp": 2})
    outcome = trimaran(tmp_path, "check", "spec.yaml", "--set", "parallel.dp=2")
    assert outcome.code == 0, outcome.err
    for words in ("tp 2 x pp 2 x dp 2", "8 ranks", "1f1b", "parameters", "total tokens"):
        assert words in outcome.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["schedule.svg", "schedule.png"])
def test_check_draws_the_schedule(name: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 1, "pp": 2})
    outcome = trimaran(tmp_path, "check", "spec.yaml", "--picture", name)
    assert outcome.code == 0, outcome.err
    assert name in outcome.err
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data[:200]


def test_check_refuses_a_picture_of_another_kind(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran(tmp_path, "check", "spec.yaml", "--picture", "schedule.gif")
    assert outcome.code == 2
    assert outcome.last_line == "error: --picture must end in .svg or .png; got schedule.gif"


def test_schema_is_a_json_schema_that_the_spec_obeys(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran(tmp_path, "schema")
    assert outcome.code == 0
    schema = json.loads(outcome.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((tmp_path / "spec.yaml").read_text()), schema)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "cannot be read: No such file"]),
        (["check", "nowhere.yaml"], ["nowhere.yaml", "cannot be read: No such file"]),
        (
            ["train", "spec.yaml", "--set", "parallel.pt=2"],
            ["parallel.pt: unknown field; the fields of parallel are tp, pp"],
        ),
        (
            ["train", "spec.yaml", "--set", "train.num_step=2"],
            ["train.num_step: unknown field; did you mean train.num_steps?"],
        ),
        (["train", "spec.yaml", "--set", "trian.num_steps=2"], ["trian: unknown field; did you mean train?"]),
        (["train", "spec.yaml", "--set", "train.num_steps"], ["is not FIELD=VALUE"]),
        (["train", "spec.yaml", "--set", "parallel.tp=two"], ["parallel.tp", "two"]),
        (["train", "spec.yaml", "--set", "parallel.tp=3"], ["num_heads", "parallel.tp"]),
        (["generate", "nowhere"], ["nowhere has no whole checkpoint", "trimaran train"]),
        (["generate", "."], ["has no whole checkpoint"]),
        (["report", "nowhere"], ["nowhere", "does not exist"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("train", "check", "generate", "report") else "",
)
def test_a_wrong_argument_gets_a_sentence(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran(tmp_path, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert all(word in outcome.err for word in words), outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()


def test_every_error_of_a_spec_is_told_at_once(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    outcome = trimaran(
        tmp_path, "check", "spec.yaml", "--set", "parallel.pt=2", "--set", "optimizer.lr=-1", "--set", "train.seq_len=0"
    )
    assert outcome.code == 2
    assert all(name in outcome.err for name in ("parallel.pt", "optimizer.lr", "train.seq_len"))
