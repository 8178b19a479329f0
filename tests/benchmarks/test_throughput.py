"""benchmarks/throughput.py runs and prints its table; the figures are not tested."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.scripts import load_script
from tests.launchers.runs import run_forked
from trimaran.runtime import spec
from trimaran.runtime.spec import RunSpec, parse_spec

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "throughput.py"

throughput = load_script("throughput")


@pytest.mark.slow
@pytest.mark.timeout(620)
def test_throughput_table_has_a_row_for_each_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_apart = throughput.run_apart

    def plain_here(layout: str, options: argparse.Namespace) -> dict[str, float]:
        if layout == "plain":  # it needs no process of its own where its figures mean nothing
            torch.set_num_threads(1)
            figures: dict[str, float] = throughput.measure(
                throughput.plain_step(throughput.SMOKE), options.steps, lambda value: value
            )
            return figures
        apart: dict[str, float] = run_apart(layout, options)
        return apart

    monkeypatch.setattr(throughput, "run_apart", plain_here)
    monkeypatch.setattr(subprocess, "run", run_forked)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke", "--steps", "1", "single", "tp2"])
    throughput.main()
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for layout in ("single", "tp2"):
        assert all(float(figure) > 0 for figure in rows[layout][1:])


class SpecSeen(Exception):
    """Ends a rank once its spec was read."""


@pytest.mark.parametrize("layout", throughput.LAYOUTS)
def test_every_layout_is_a_valid_run_on_as_many_ranks_as_are_started(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, world_sizes = throughput.LAYOUTS[layout], []

    def parse(data: dict[str, Any]) -> RunSpec:
        read = parse_spec(data)
        assert {name: getattr(read.parallel, name) for name in sizes} == sizes
        world_sizes.append(read.world_size)
        raise SpecSeen

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        flag = "--nproc-per-node"
        world_sizes.append(int(command[command.index(flag) + 1]) if flag in command else 1)
        return subprocess.CompletedProcess(command, 0, '{"seconds": 1.0, "cpu_seconds": 1.0}', "")

    monkeypatch.setattr(spec, "parse_spec", parse)
    monkeypatch.setattr(subprocess, "run", start)
    for setting in (throughput.SMOKE, throughput.Setting()):
        with pytest.raises(SpecSeen):
            throughput.trimaran_step(setting, layout, shared_memory=True)
    throughput.run_apart(layout, argparse.Namespace(steps=1, without_shared_memory=False, smoke=True))
    assert len(set(world_sizes)) == 1


def test_unknown_layout_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "tp3"])
    with pytest.raises(SystemExit, match="2"):
        throughput.main()
    assert "unknown layouts ['tp3']" in capsys.readouterr().err


def test_a_layout_that_fails_leaves_the_figures_of_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_apart(layout: str, options: Any) -> dict[str, float]:
        if layout == "pp2":
            raise throughput.RanksFailed("aborted", 1)
        return {"seconds": 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(throughput, "run_apart", run_apart)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "tp2", "pp2", "dp2"])
    with pytest.raises(SystemExit, match="failed: pp2"):
        throughput.main()
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["tp2", "dp2"]
    assert printed.err == "pp2 failed:\naborted\n"
