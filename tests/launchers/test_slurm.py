"""Runs on a real Slurm of six nodes: the same losses as the local launcher, through time limits, lost nodes, cancelling and bad nodes.

Nothing sleeps for a fixed time: states are waited for, and rank 0 is held at a step where something shall happen to a run that is under way.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.runs import RAISE_AT_STEP_6, TRIMARAN, Hold, fault, losses, make_workplace, trimaran
from tests.launchers.slurm_cluster import Cluster, running_cluster, why_not
from trimaran.launchers.slurm.commands import parse_state
from trimaran.launchers.slurm.job import jobs_of
from trimaran.runtime.checkpoint.folder import latest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
ROOT = Path(__file__).parents[2]
TWO_RANKS, FOUR_RANKS = {"tp": 2, "pp": 1}, {"tp": 2, "pp": 2}
STEPS = 30
TRAIN = {"num_steps": STEPS, "eval_interval": 0}
OFTEN = {"interval": 10, "keep_last": 20}
JOB_S = 300.0  # twenty seconds on idle cores
SECRET = "hunter2-of-the-hub"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=6, cpus=16) as cluster:
        yield cluster


class Run:
    """A workplace whose run is a batch job; with `hold` one that waits before the step after it."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        hold: int | None = None,
        environment: dict[str, str] | None = None,
        **sections: dict[str, Any],
    ) -> None:
        defaults: dict[str, dict[str, Any]] = {
            "parallel": TWO_RANKS,
            "train": TRAIN,
            "checkpoint": OFTEN,
            "slurm": {"nodes": 2, "preflight": False},
            "launcher": {"start_timeout_s": 120.0, "timeout_s": 600.0},  # ranks wait for the one that is held
        }
        for name, fields in sections.items():
            defaults[name] = defaults.get(name, {}) | fields
        self.cluster, self.workplace = cluster, make_workplace(folder, **defaults)
        self.run = self.workplace.run
        self.hold = None if hold is None else Hold(folder, hold)
        self.environment = cluster.environment | (self.hold.environment if self.hold else {}) | (environment or {})

    def trimaran(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command; the job's ranks work in the same folder and are none of its own."""
        return subprocess.run(
            [*TRIMARAN, *arguments],
            cwd=self.workplace.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=JOB_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def submit(self, *options: str) -> str:
        outcome = self.trimaran("train", "spec.yaml", "--launcher", "slurm", *options)
        assert outcome.returncode == 0, outcome.stderr
        return jobs_of(self.run)[-1]["job"]

    def submit_and_hold(self) -> str:
        """Submit the job and return it when rank 0 is held."""
        job, hold = self.submit(), self.hold
        assert hold is not None
        self.cluster.wait_for("the step to hold at", lambda: hold.reached or self.state(job).has_ended, JOB_S)
        assert hold.reached, self.log()
        return job

    def release(self) -> None:
        assert self.hold is not None
        self.hold.release()

    def state(self, job: str) -> Any:
        return parse_state(self.cluster.call("scontrol", "show", "job", job, "--oneliner").splitlines()[0])

    def log(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted((self.run / "logs").glob("slurm-*.log")))

    def finish(self, job: str) -> Any:
        """Wait for the job's end; return its state."""
        self.cluster.wait_for(f"the end of job {job}", lambda: self.state(job).has_ended, JOB_S)
        return self.state(job)


def train_here(folder: Path, parallel: dict[str, int]) -> list[Any]:
    """Losses and norms of the run through the local launcher."""
    workplace = make_workplace(folder, parallel=parallel, train=TRAIN, checkpoint=OFTEN)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return losses(workplace)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return train_here(tmp_path_factory.mktemp("two"), TWO_RANKS)


@pytest.fixture(scope="module")
def expected_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return train_here(tmp_path_factory.mktemp("four"), FOUR_RANKS)


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A job that is held until Slurm's signal before its time limit, on two nodes of its own, while the other tests run."""
    run = Run(
        cluster, tmp_path_factory.mktemp("limited"), hold=20, slurm={"nodes": 2, "time": "3", "signal_lead_s": 60, "exclude": "n[3-6]"}
    )
    return run, run.submit()


def test_tasks_of_ranks_and_agents_give_the_losses_of_the_local_launcher(
    cluster: Cluster, expected_of_four: list[Any], tmp_path: Path
) -> None:
    """Two jobs at once on the same nodes, one of them with the preflight."""
    where = {"exclude": "n[1-2],n[5-6]"}
    runs = [
        Run(cluster, tmp_path / "ranks", parallel=FOUR_RANKS, slurm={"preflight": True, **where}),
        Run(cluster, tmp_path / "agents", parallel=FOUR_RANKS, slurm={"tasks": "node", **where}),
    ]
    jobs = [run.submit() for run in runs]
    for run, job in zip(runs, jobs, strict=True):
        state = run.finish(job)
        assert (state.state, state.exit_code) == ("COMPLETED", 0), run.log()
        assert losses(run.workplace) == expected_of_four
        assert not list(run.run.glob(".meet-*")), "the notice with rank 0's address is taken down"
    assert "preflight: ring of 2 nodes" in runs[0].log()
    status = runs[0].trimaran("status", "run")
    assert "completed, on n" in status.stdout
    assert f"step {STEPS} of {STEPS}" in status.stdout
    assert f"step {STEPS}/{STEPS}" in runs[0].trimaran("logs", "run").stdout
    assert (runs[0].run / "report.html").exists()


def test_srun_with_mpi_gives_the_losses_of_the_local_launcher(cluster: Cluster, expected_of_four: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, parallel=FOUR_RANKS)
    command = ["srun", "--mpi=pmi2", "-N2", "-n4", "--overcommit", sys.executable, "-m", "trimaran.launchers.cli", "train", "spec.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=run.environment, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run.workplace) == expected_of_four
    assert list((run.run / "logs").glob("mpi-*"))


def test_a_job_whose_node_is_lost_goes_on_elsewhere(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, hold=25, slurm={"exclude": "n[1-2]"})
    job = run.submit_and_hold()
    lost = cluster.call("scontrol", "show", "hostnames", run.state(job).nodes).split()[-1]
    cluster.lose_node(lost)
    run.release()
    try:
        cluster.wait_for("the requeue", lambda: run.state(job).restarts == 1, JOB_S)
        state = run.finish(job)
    finally:
        cluster.start()
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert losses(run.workplace) == expected
    assert "it was killed (out of memory, perhaps), or its host is lost" in run.log()


def test_cancelling_saves_and_the_run_can_go_on(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, hold=14)
    job = run.submit_and_hold()
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm")
    assert refused.returncode != 0
    assert "is of this run already; `trimaran cancel" in refused.stderr
    outcome = run.trimaran("cancel", "run")
    assert outcome.returncode == 0, outcome.stderr
    assert "the ranks save and leave" in outcome.stderr
    assert run.finish(job).exit_code == 143, run.log()
    assert (latest(run.run / "checkpoints") or Path()).name == "step-00000015"
    state = run.finish(run.submit())
    assert state.state == "COMPLETED", run.log()
    assert losses(run.workplace) == expected


def test_scancel_saves_too(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, hold=12)
    job = run.submit_and_hold()
    mine = [process for process in cluster.steps() if process.name().startswith("trimaran-") and process.cwd() == str(tmp_path)]
    assert len(mine) == 2
    cluster.call("scancel", job)
    assert run.finish(job).state == "CANCELLED"
    cluster.wait_for("the ranks' end", lambda: not any(process.is_running() for process in mine), 60)
    assert (latest(run.run / "checkpoints") or Path()).name == "step-00000013", run.log()


# A matrix product is slow on one node, and the disk of another is full.
BAD_NODES = """
import os
import sys

if sys.argv[0] == "-m" and os.environ.get("SLURMD_NODENAME") == "n3":
    import time

    import torch

    real = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda self, other: (time.sleep(0.3), real(self, other))[1]
if sys.argv[0] == "-m" and os.environ.get("SLURMD_NODENAME") == "n4":
    import shutil

    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0)
"""


def test_slow_and_full_nodes_are_named_left_out_and_replaced(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(BAD_NODES)
    environment = {"PYTHONPATH": str(tmp_path / "fault")}
    run = Run(
        cluster,
        tmp_path / "run-place",
        environment=environment,
        train={"num_steps": 4},
        slurm={"preflight": True, "nodes": 3, "exclude": "n1"},
        parallel={"tp": 3, "pp": 1},
        model={"num_heads": 3, "hidden_size": 24, "ffn_hidden_size": 24},
    )
    state = run.finish(run.submit())
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert "node n3 is not used: a matrix product at " in run.log()
    assert "node n4 is not used: 0.0 GiB free in the run folder" in run.log()
    assert not {"n1", "n3", "n4"} & set(cluster.call("scontrol", "show", "hostnames", state.nodes).split())


def test_a_controller_that_restarts_does_not_disturb_a_run(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, hold=20)
    job = run.submit_and_hold()
    cluster.restart_controller()
    run.release()
    state = run.finish(job)
    assert (state.state, state.restarts) == ("COMPLETED", 0), run.log()
    assert losses(run.workplace) == expected


def test_a_rank_that_fails_ends_the_job_is_named_first_and_secrets_stay_in_the_environment(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, environment=fault(tmp_path, RAISE_AT_STEP_6, rank=1) | {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET})
    state = run.finish(run.submit())
    assert (state.state, state.exit_code) == ("FAILED", 1), run.log()
    said = next(line for line in run.log().splitlines() if line.startswith("error:"))
    assert "rank 1 (host n" in said
    assert "pp 0, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said
    assert "made to fail" in run.trimaran("status", "run").stdout
    assert "KeyError" in run.trimaran("logs", "run", "--rank", "1").stdout
    assert [file for file in run.run.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()] == []


def test_names_that_a_shell_would_run_do_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, train={"num_steps": 2}, parallel={"tp": 1, "pp": 1}, slurm={"nodes": 1})
    hostile = "run of; touch x & (touch y)"
    outcome = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--set", f"train.output_dir={hostile}")
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / hostile
    job = jobs_of(folder)[-1]["job"]
    assert run.finish(job).state == "COMPLETED", (folder / "logs" / f"slurm-{job}.log").read_text()
    assert not {"x", "y"} & {path.name for path in tmp_path.rglob("*")}
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--set", "train.output_dir=$(touch x); rm -rf run")
    assert refused.returncode == 2
    assert "has characters that an #SBATCH line can't hold" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_every_command_of_the_page_does_what_it_says(cluster: Cluster, tmp_path: Path) -> None:
    """The lines of docs/clusters.md that start a program, in their order, with a spec of four steps and its run."""
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s{2,}", line)[0] for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith(("trimaran ", "torchrun ", "mpirun ", "srun "))]
    assert len(commands) >= 10
    run = Run(cluster, tmp_path, train={"num_steps": 4}, slurm={"nodes": 1})
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    words = {"SPEC": "spec.yaml", "RUN": "run", "8": "2"}
    for number, command in enumerate(commands):
        if "n1:29400" in command or "launcher.nodes=2" in command:  # test_other_launchers runs these, on two nodes
            continue
        if command[0] != "trimaran" or command[1] == "train":
            for folder in tmp_path.glob("run*"):
                assert all(run.finish(job["job"]).state == "COMPLETED" for job in jobs_of(folder)), run.log()
            shutil.rmtree(run.run, ignore_errors=True)
        shown = [words.get(word, word) for word in command]
        done = subprocess.run(
            shown, cwd=tmp_path, env=run.environment | {"PATH": path}, capture_output=True, text=True, timeout=JOB_S, check=False
        )
        assert done.returncode == 0, f"{number}: {shown}\n{done.stdout}\n{done.stderr}\n{run.log()}"
    assert len({(folder / "metrics.jsonl").read_text() for folder in tmp_path.glob("run-*")}) == 4, (
        "a run for each combination of the array"
    )


def test_the_time_to_the_first_step_is_taken_apart(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks" / "slurm_start.py"), "spec.yaml", "--repeats", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=run.environment, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == ["2", "2"]
    assert all(float(cell) > 0 for cell in cells[3:5])


def test_the_script_is_valid_shell(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel=FOUR_RANKS)
    settings = ["slurm.nodes=2", "slurm.modules=[cuda/12.4, 'a b; touch x']", "slurm.container=image.sif", "slurm.cpus_per_task=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = trimaran(workplace.folder, "train", "spec.yaml", "--launcher", "slurm", "--dry-run", *options)
    assert outcome.code == 0, outcome.err
    assert "module load 'a b; touch x'" in outcome.out
    subprocess.run(["bash", "-n"], input=outcome.out, text=True, check=True)
    assert not workplace.run.exists()


def test_a_job_that_reaches_its_time_limit_saves_is_requeued_and_goes_on_as_if_nothing_had_been(
    limited: tuple[Run, str], expected: list[Any]
) -> None:
    run, job = limited
    state = run.finish(job)
    assert state.state == "COMPLETED", run.log()
    assert state.restarts > 0
    assert losses(run.workplace) == expected
    assert "resuming at step 21" in run.log()


def test_a_failure_is_told_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    """From a rank's death to the job's end."""
    run = Run(cluster, tmp_path, hold=3)
    job = run.submit_and_hold()
    victim = next(process for process in cluster.steps() if process.name() == "trimaran-1" and process.cwd() == str(tmp_path))
    victim.kill()
    start = time.monotonic()
    state = run.finish(job)
    assert time.monotonic() - start < 60  # under 5 s on idle cores, plus the probe of the nodes
    assert (state.state, state.exit_code) == ("FAILED", 137), run.log()
    assert "error: rank 1 (host n" in run.log()
