"""Ranks that torchrun and mpirun start by themselves: the losses of the local launcher bit for bit, failures told at once, starts that don't fit refused."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.runs import losses, make_workplace
from tests.launchers.test_slurm import FAILS

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SECTIONS: dict[str, dict[str, Any]] = {"parallel": {"tp": 2, "pp": 2}, "train": {"num_steps": 8, "eval_interval": 0}}
WAYS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "4", "-m", "trimaran.launchers.worker", "spec.yaml"],
    "mpirun": [str(BIN / "mpirun"), "-n", "4", sys.executable, "-m", "trimaran.launchers.cli", "train", "spec.yaml"],
    "launcher-mpi": [sys.executable, "-m", "trimaran.launchers.cli", "train", "spec.yaml", "--launcher", "mpi"],
}


def run(command: list[str], folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    workplace = make_workplace(tmp_path_factory.mktemp("local"), **SECTIONS)
    assert workplace.train().code == 0
    return losses(workplace)


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_the_local_launcher(way: str, expected: list[Any], tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    done = run(WAYS[way], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(workplace) == expected
    assert (workplace.run / "report.html").exists()
    assert sorted(path.name for path in next((workplace.run / "logs").glob("*-*")).iterdir()) == [f"rank-{rank}" for rank in range(4)]


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_rank_that_fails_is_named_and_ends_all(way: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS)
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAILS)
    start = time.monotonic()
    done = run(WAYS[way], tmp_path, PYTHONPATH=str(tmp_path / "fault"))
    assert done.returncode != 0
    assert time.monotonic() - start < 100
    said = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "pp 1, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_number_of_ranks_that_is_not_the_layouts_is_refused(way: str, tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    command = [word if word != "4" else "3" for word in WAYS[way]]
    done = run(command, tmp_path)
    assert done.returncode != 0
    assert "!= WORLD_SIZE 3" in done.stderr
    assert not workplace.run.exists()


def test_a_port_in_use_is_told_with_its_address(tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS)
    place = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "trimaran.launchers.worker", "spec.yaml", "--set", "launcher.start_timeout_s=1"]
    done = run(command, tmp_path, **place)
    assert done.returncode == 1
    assert "at 127.0.0.1:1 did not answer within 1 s" in done.stderr
