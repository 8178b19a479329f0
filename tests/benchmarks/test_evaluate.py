"""benchmarks/evaluate.py answers alike on both sides and prints its tables; the figures are not tested."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.scripts import load_script
from tests.launchers.runs import run_forked

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("evaluate")


def rows_of(
    mode: str, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> list[list[str]]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), mode, "--smoke", "--threads", "1", "--repeats", "1", *more])
    assert benchmark.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_every_mode_prints_its_table(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of("likelihoods", benchmark, monkeypatch, capsys)
    assert row[:4] == ["smoke", "36", "180", "48"]
    assert all(float(figure) >= 0 for figure in row[4:])
    (row,) = rows_of("generation", benchmark, monkeypatch, capsys)
    assert row[:4] == ["gsm8k", "3", "3", "4"]
    assert all(float(figure) >= 0 for figure in row[4:])
    (row,) = rows_of("in-loop", benchmark, monkeypatch, capsys)
    assert row[:3] == ["gpt-tiny", "arc_easy", "3"]
    assert all(float(figure) >= 0 for figure in row[3:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_layouts_and_every_answer_agree(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", run_forked)
    rows = rows_of("layouts", benchmark, monkeypatch, capsys, "--layouts", "1", "dp2")
    assert [row[:4] for row in rows] == [["1", "1", "1", "36"], ["dp2", "2", "1", "36"]]
    assert all(float(row[-1]) < 1e-4 for row in rows)
    rows = rows_of("compare", benchmark, monkeypatch, capsys, "--tasks", "arc_easy", "gsm8k", "copa")
    assert [row[:5] for row in rows] == [
        ["arc_easy", "1", "auto", "3", "6"],
        ["gsm8k", "1", "auto", "3", "3"],
    ]
    assert all(row[-1] == "yes" for row in rows)
