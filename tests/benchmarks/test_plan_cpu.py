"""benchmarks/plan_cpu.py: its layouts are valid runs that can be planned, and pairs are counted; figures need a run."""

import sys
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load_script
from tests.plan.test_calibrate import machine
from trimaran.runtime.plan.calibrate.processor_step import processor_step

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_cpu.py"

plan_cpu = load_script("plan_cpu")


@pytest.mark.parametrize("layout", plan_cpu.LAYOUTS)
def test_every_layout_can_be_planned(layout: str) -> None:
    spec = plan_cpu.spec_of(layout)
    for field, value in plan_cpu.LAYOUTS[layout].items():
        section, name = field.split(".")
        assert getattr(getattr(spec, section), name) == value
    assert processor_step(spec, machine()).seconds > 0


def test_there_are_at_least_eight() -> None:
    assert len(plan_cpu.LAYOUTS) >= 8


def test_pairs_that_are_apart_are_counted_and_the_wrong_ones_named() -> None:
    measured = {"a": 1.0, "b": 1.05, "c": 2.0}
    assert plan_cpu.pairs_in_order(measured, {"a": 1.0, "b": 3.0, "c": 2.0}) == (1, 2, ["b before c"])
    assert plan_cpu.pairs_in_order(measured, {"a": 2.0, "b": 2.0, "c": 2.0})[0] == 0, "a tie is no order"


def test_processor_time_is_that_of_a_rank_or_of_all_over_the_cores() -> None:
    assert plan_cpu.step_of_cpu({"cpu_seconds": 4.0, "ranks": 1}, 2) == 4.0
    assert plan_cpu.step_of_cpu({"cpu_seconds": 4.0, "ranks": 4}, 2) == 2.0


def test_the_report_has_a_row_of_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    plan_cpu.report({"tp2": (1.0, 1.0), "dp2": (0.5, 0.5)}, {"tp2": 1.2, "dp2": 0.4}, {"tp2": 1.1, "dp2": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["dp2", "tp2"]
    assert lines[3].startswith("wall clock: 1 of 1 pairs in order (100%)")


def test_an_unknown_layout_or_no_calibration_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, error in (
        (["tp3", "--chip", "x.json"], "unknown layouts ['tp3']"),
        (["tp2"], "--chip FILE: give a"),
    ):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit, match="2"):
            plan_cpu.main()
        assert error in capsys.readouterr().err
