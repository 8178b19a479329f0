"""On a real Slurm: the commands of docs/clusters.md, and the benchmark of a job's start."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.forked import SOCKET, fork_server
from tests.launchers.runs import Command, losses, make_workplace, run_script, torchrun_port, trimaran
from tests.launchers.slurm_cluster import Cluster, running_cluster, why_not
from tests.launchers.slurm_runs import JOB_S, Run
from trimaran.launchers.slurm.jobs import jobs_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=16) as cluster:
        yield cluster


def commands_of_the_page() -> list[list[str]]:
    """Return the lines of docs/clusters.md that start a program; test_other_launchers runs those on two nodes."""
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    text = re.sub(r"\\\n\s*", "", text)  # a command may continue on the next line
    blocks = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s{2,}", line)[0] for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith(("trimaran ", "torchrun ", "mpirun ", "srun "))]
    assert len(commands) >= 10
    return [each for each in commands if "n1:29400" not in each and "launcher.nodes=2" not in each]


def test_every_command_of_the_page_does_what_it_says(cluster: Cluster, tmp_path: Path) -> None:
    """In their order, with a spec of four steps and its run."""
    run = Run(cluster, tmp_path, train={"num_steps": 4}, parallel={"tp": 1}, launcher={"nodes": 1}, forked=True)
    for command in commands_of_the_page():
        if command[0] != "trimaran":
            continue
        if command[1] == "train":
            for folder in tmp_path.glob("run*"):
                assert all(run.finish(job["job"]).state == "COMPLETED" for job in jobs_of(folder)), run.log()
            shutil.rmtree(run.run, ignore_errors=True)
        words = {"SPEC": "spec.yaml", "RUN": "run"}
        shown = [words.get(word, word) for word in command]
        done = run.trimaran(*shown[1:])
        assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}\n{run.log()}"
    assert len({(folder / "metrics.jsonl").read_text() for folder in tmp_path.glob("run-*")}) == 4, (
        "a run for each combination of the array"
    )


def test_the_other_launchers_of_the_page_give_the_same_losses(cluster: Cluster, tmp_path: Path) -> None:
    """Of four steps on two ranks; test_other_launchers compares torchrun and mpirun with the local launcher."""
    run = Run(cluster, tmp_path, train={"num_steps": 4}, launcher={"nodes": 1})
    forked = tmp_path / "bin"  # of mpirun ranks start cold: MPI does not always initialise in a fork
    forked.mkdir()
    for name in ("torchrun", "trimaran"):
        (forked / name).symlink_to(fork_server().shim)
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    environment = run.environment | {SOCKET: os.environ[SOCKET]}
    found: dict[str, list[Any]] = {}
    for command in commands_of_the_page():
        if command[0] == "trimaran":
            continue
        shutil.rmtree(run.run, ignore_errors=True)
        words = {"SPEC": "spec.yaml", "8": "2"}
        shown = [words.get(word, word) for word in command]
        done = subprocess.run(
            shown,
            cwd=tmp_path,
            env=environment | torchrun_port() | {"PATH": path if command[0] == "mpirun" else f"{forked}:{path}"},
            capture_output=True,
            text=True,
            timeout=JOB_S,
            check=False,
        )
        assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"
        found[command[0]] = losses(run.workplace)
    assert len(found["srun"]) == 4
    assert found["srun"] == found["torchrun"] == found["mpirun"]


def test_a_job_that_sbatch_refuses_is_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, parallel={"tp": 1}, launcher={"nodes": 1}, slurm={"partition": "nope"})
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "Invalid partition name specified; set slurm.partition to one that `sinfo` lists" in refused.stderr
    missing = run.trimaran("cancel", "run")
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)


def test_the_time_to_the_first_step_is_taken_apart(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, parallel={"tp": 1}, launcher={"nodes": 1}, forked=True)
    script = ROOT / "benchmarks" / "slurm_start.py"
    done = run_script(tmp_path, script, "spec.yaml", "--repeats", "1", environment=run.environment)
    assert done.code == 0, done.err
    cells = [cell.strip() for cell in done.out.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == ["1", "1"]
    assert all(float(cell) > 0 for cell in cells[3:5])


def test_workers_of_a_recipe_are_started_by_srun(cluster: Cluster, tmp_path: Path) -> None:
    """Without a job of its own, prepare has srun ask for one; manifest and shards are those of a machine alone."""
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.jsonl").write_text(f'{{"text": "a line {number // 2} of text"}}\n')
    data = {"corpora": {"a": {"source": ["texts"]}}, "dedup": {"near": False}, "clean": {}, "workers": 2}
    run = make_workplace(tmp_path, data={"source": ["quickstart"], **data})
    alone = trimaran(tmp_path, "prepare", "spec.yaml", "--set", "data.cache_dir=alone")
    assert alone.code == 0, alone.err
    words = ["prepare", "spec.yaml", "--launcher", "slurm"]
    with Command.start(run.folder, words, dict(cluster.environment)) as command:
        together = command.finish()
    assert together.code == 0, together.err
    names = [
        [path.name for path in (tmp_path / cache / "recipes" / "manifests").iterdir()] for cache in ("alone", "cache")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 1
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / cache / "data").glob("*/*.bin")}
        for cache in ("alone", "cache")
    ]
    assert shards[0]
    assert shards[0] == shards[1]
    assert len(list((tmp_path / "cache" / "recipes" / "tokens").iterdir())) == 1, "four small files are one part"
