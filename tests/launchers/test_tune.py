"""`trimaran tune` as a user runs it: its trials, kills of tuner, worker and rank, two tuners, and trials that fail."""

import json
import os
import runpy
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launchers.runs import RAISE_AT_STEP_6, Command, Outcome, Workplace, fault, make_workplace, trimaran
from trimaran.runtime.files import write_text
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.tune.study import Found, Study

_BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "tune.py"))
losses_of, processes_in, rows_of_table = (_BENCHMARK[name] for name in ("losses_of", "processes_in", "rows_of_table"))
SEARCH: dict[str, Any] = {
    "base": "spec.yaml",
    "output_dir": "study",
    "space": {"optimizer.lr": {"low": 1e-3, "high": 0.3, "log": True}, "model.num_heads": [2, 5]},
    "search": {"sampler": "tpe", "trials": 5, "seed": 1},
    "prune": {"method": "hyperband", "first_step": 4, "factor": 2},
}
EQUAL: dict[str, Any] = {
    "base": "spec.yaml",
    "output_dir": "study",
    "space": {"logging.interval": [1, 2], "optimizer.lr": [3e-3, 1e30]},
    "search": {"sampler": "grid"},
}
FEW_STEPS = {"num_steps": 12, "eval_interval": 4}


def make_study(folder: Path, search: dict[str, Any], **sections: dict[str, Any]) -> Workplace:
    place = make_workplace(folder, **({"parallel": {"tp": 1}, "train": FEW_STEPS} | sections))
    (folder / "tune.yaml").write_text(yaml.safe_dump(search))
    return place


def read(folder: Path) -> Found:
    return Study(folder / "study", {}).read()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A search that went through without a stop."""
    folder = tmp_path_factory.mktemp("search")
    make_study(folder, SEARCH)
    return folder, trimaran(folder, "tune", "tune.yaml")


def test_a_search_runs_its_trials_and_tells_the_best(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    assert outcome.code == 0, outcome.err
    assert not outcome.left
    found = read(folder)
    states = [trial.state for trial in found.trials]
    assert states.count("complete") + states.count("pruned") == 5
    assert {"complete", "pruned", "invalid"} == set(states)
    for trial in found.trials:
        run = folder / "study" / trial.folder
        assert run.exists() == (trial.state != "invalid")
        if trial.state == "invalid":
            assert "num_heads" in str(trial.error)
            continue
        spec = load_spec(run / "spec.yaml")
        assert spec.optimizer.lr == trial.values["optimizer.lr"]
        assert (run / "report.html").exists()
        last = [row for row in read_metrics(run / "metrics.jsonl") if "held_out_loss" in row][len(trial.curve) - 1]
        assert trial.objectives == (last["held_out_loss"],)
        assert trial.tokens == trial.curve[-1].tokens == (last["step"] or 0) * spec.tokens_per_step
    complete = [trial for trial in found.trials if trial.state == "complete"]
    best = min(complete, key=lambda trial: trial.objectives or ())
    assert f"study/{best.folder}" in outcome.out
    assert f"optimizer.lr={best.values['optimizer.lr']!r}" in outcome.out


def test_status_and_best_read_the_study_and_dry_run_starts_nothing(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    table = trimaran(folder, "tune", "status", "study").out
    assert "pruned" in table
    assert "against a rule: model." in table
    assert trimaran(folder, "tune", "best", "study").out.splitlines()[:5] == outcome.out.splitlines()[:5]
    before = (folder / "study" / "study.jsonl").read_bytes()
    told = trimaran(folder, "tune", "tune.yaml", "--dry-run")
    assert "random combinations can be started" in told.err
    assert (folder / "study" / "study.jsonl").read_bytes() == before


# Rank 0 of a trial waits before the step that a file names, and says that it does; some trials shall not wait again.
HOLD_EACH = """
import json
import signal
import time
from contextlib import suppress
from pathlib import Path
import trimaran.runtime.train.loop as loop
from trimaran.runtime.files import write_text

real, trial, hold = loop.lr_at, str(folders[0].parents[1]), Path({hold!r})

def is_held(step):
    with suppress(OSError):
        asked = json.loads(hold.read_text())
        return asked["step"] == step and trial not in asked["not"]
    return False

def lr_at(step, **options):
    if is_held(step):
        write_text(Path({reached!r}), trial)
        stop = signal.getsignal(signal.SIGTERM).__self__
        while is_held(step) and not stop.requested:
            time.sleep(0.02)
    return real(step, **options)

loop.lr_at = lr_at
"""


def test_a_search_that_was_killed_goes_on_to_the_same_table(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    """SIGKILL of a rank, a worker and the tuner, each in the middle of another trial."""
    make_study(tmp_path, SEARCH)
    hold, reached = tmp_path / "hold", tmp_path / "reached"
    killed: list[str] = []

    def kill(kind: str) -> None:
        pids = [command.process.pid] if kind == "tuner" else processes_in(tmp_path)[kind]
        assert len(pids) == 1, f"{kind}: {pids}"
        os.kill(pids[0], signal.SIGKILL)

    environment = fault(tmp_path, HOLD_EACH.format(hold=str(hold), reached=str(reached)), rank=0)
    with Command.start(tmp_path, ["tune", "tune.yaml"], environment) as command:
        for kind, step in (("rank", 6), ("worker", 2), ("tuner", 3)):
            write_text(hold, json.dumps({"step": step, "not": killed}))
            command.wait_until(reached.exists)
            killed.append(reached.read_text())
            kill(kind)
            reached.unlink()
            hold.unlink()
        command.process.wait(100)
    assert len(set(killed)) == 3
    outcome = trimaran(tmp_path, "tune", "tune.yaml")
    assert outcome.code == 0, outcome.err
    assert "going on with the study" in outcome.err
    expected, found = read(finished[0]), read(tmp_path)
    assert rows_of_table(found) == rows_of_table(expected)
    for trial in expected.trials:
        if trial.state != "invalid":
            assert losses_of(tmp_path / "study", trial) == losses_of(finished[0] / "study", trial)


def test_two_tuners_share_the_work_and_divergence_is_a_result(tmp_path: Path) -> None:
    make_study(tmp_path, EQUAL)
    with ExitStack() as stack:
        commands = [stack.enter_context(Command.start(tmp_path, ["tune", "tune.yaml"])) for _ in range(2)]
        codes = [command.process.wait(250) for command in commands]
    assert codes == [0, 0], commands[0].printed()
    trials = read(tmp_path).trials
    assert [trial.state for trial in trials] == ["complete", "diverged"] * 2
    assert "training diverged at step" in str(trials[1].error)
    assert trials[0].objectives == trials[2].objectives
    logs = [log.read_text() for log in (tmp_path / "study" / "logs").glob("*.log")]
    assert logs, "of both, unless one had done all before the other looked"
    ends = [f"trial {trial.number} is {trial.state}" for trial in trials]
    assert [sum(log.count(end) for log in logs) for end in ends] == [1] * 4


def test_a_crash_is_tried_again_and_then_told(tmp_path: Path) -> None:
    make_study(tmp_path, {**EQUAL, "space": {"logging.interval": [1]}, "max_retries": 1})
    outcome = trimaran(tmp_path, "tune", "tune.yaml", environment=fault(tmp_path, RAISE_AT_STEP_6, rank=0))
    assert outcome.code == 2
    assert "trial 0 failed after 2 attempts" in outcome.err
    assert "made to fail" in outcome.err
    assert "no trial in study is complete" in outcome.last_line
