"""`trimaran train RUN` goes on with a run by its folder; `--quiet` says where the report is and nothing else."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.launchers.runs import Workplace, make_workplace, trimaran
from trimaran.launchers.cli.app import app
from trimaran.runtime.train.metrics import read_metrics

STEPS = {"num_steps": 3, "eval_interval": 0}


@pytest.mark.slow
def test_a_run_goes_on_by_its_folder_where_it_lies_now_and_quietly(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel={"tp": 1}, train=STEPS)
    first = trimaran(tmp_path, "train", "spec.yaml", "--quiet")
    assert (first.code, first.out, first.err) == (0, "", f"report: {workplace.run / 'report.html'}\n")
    again = trimaran(tmp_path, "train", "run", "--set", "train.num_steps=4", "--quiet")
    assert (again.code, again.err) == (0, first.err)
    assert [row["step"] for row in workplace.rows()] == [1, 2, 3, 4]
    moved = Workplace(tmp_path / "later")
    shutil.copytree(workplace.run, moved.run)
    there = trimaran(tmp_path, "train", "later/run", "--set", "train.num_steps=5")
    assert there.code == 0, there.err
    assert (
        f"later/run/spec.yaml names {workplace.run}, and the run goes on where it lies now, in later/run" in there.err
    )
    assert read_metrics(moved.run / "metrics.jsonl")[-1]["step"] == 5
    assert [row["step"] for row in workplace.rows()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_quiet_run_tells_its_errors(tmp_path: Path) -> None:
    make_workplace(tmp_path, parallel={"tp": 1}, train=STEPS, data={"source": ["nowhere.txt"]})
    outcome = trimaran(tmp_path, "train", "spec.yaml", "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: data.source 'nowhere.txt' does not exist")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "empty"], "empty is a folder without a spec.yaml, so there is no run to go on with; give a spec"),
        (["check", "empty"], "empty is a folder without a spec.yaml, so there is no run to go on with; give a spec"),
        (["train", "run/checkpoints/step-3"], "did you mean its run, "),
        (["train", "spec.yaml", "--quiet", "--launcher", "slurm"], "--quiet is for a run on this machine alone"),
    ],
)
def test_what_is_no_run_or_can_t_be_quiet_is_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_workplace(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    shutil.copy(tmp_path / "spec.yaml", tmp_path / "run" / "spec.yaml")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert sentence in result.stderr
