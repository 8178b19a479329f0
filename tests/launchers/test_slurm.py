"""Runs on a real Slurm of three nodes: the same losses as the local launcher, through time limits, lost nodes, cancelling and a bad node.

Jobs of the longer tests run side by side; nothing sleeps for a fixed time, states are waited for.
"""

import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.runs import Outcome, Workplace, losses, make_workplace, trimaran
from tests.launchers.slurm_cluster import Cluster, running_cluster, why_not
from trimaran.launchers.slurm.commands import parse_state
from trimaran.launchers.slurm.job import jobs_of
from trimaran.runtime.checkpoint.folder import latest, step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
PARALLEL = {"tp": 2, "pp": 2}
LONG = {"num_steps": 400, "eval_interval": 0}
OFTEN = {"interval": 50, "keep_last": 20}
JOB_S = 400.0  # a minute on idle cores


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=4, cpus=16) as cluster:
        yield cluster


class Run:
    """A workplace whose run is a batch job."""

    def __init__(self, cluster: Cluster, folder: Path, **sections: dict[str, Any]) -> None:
        self.cluster = cluster
        defaults: dict[str, dict[str, Any]] = {
            "parallel": PARALLEL,
            "train": LONG,
            "checkpoint": OFTEN,
            "slurm": {"nodes": 2, "preflight": False},
            "launcher": {"start_timeout_s": 120.0},
        }
        for name, fields in sections.items():
            defaults[name] = defaults.get(name, {}) | fields
        self.workplace = make_workplace(folder, **defaults)
        self.run = self.workplace.run

    def trimaran(self, *arguments: str) -> Outcome:
        return trimaran(self.workplace.folder, *arguments, environment=self.cluster.environment)

    def submit(self, *options: str) -> str:
        outcome = self.trimaran("train", "spec.yaml", "--launcher", "slurm", *options)
        assert outcome.code == 0, outcome.err
        return jobs_of(self.run)[-1]["job"]

    def state(self, job: str) -> Any:
        return parse_state(self.cluster.call("scontrol", "show", "job", job, "--oneliner").splitlines()[0])

    def log(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted((self.run / "logs").glob("slurm-*.log")))

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_for(f"step {step}", lambda: self.reached(step), JOB_S)

    def reached(self, step: int) -> bool:
        return (self.run / "metrics.jsonl").exists() and any(row["step"] == step for row in self.workplace.rows())

    def finish(self, job: str) -> Any:
        """Wait for the job's end; return its state."""
        self.cluster.wait_for(f"the end of job {job}", lambda: self.state(job).has_ended, JOB_S)
        return self.state(job)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses and norms of the long run through the local launcher."""
    workplace = make_workplace(tmp_path_factory.mktemp("local"), parallel=PARALLEL, train=LONG, checkpoint=OFTEN)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return losses(workplace)


def test_tasks_of_ranks_and_agents_give_the_losses_of_the_local_launcher(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    """Two jobs at once on the same nodes, one of them with the preflight."""
    short = {"train": {"num_steps": 20}}
    runs = [
        Run(cluster, tmp_path / "ranks", slurm={"preflight": True}, **short),
        Run(cluster, tmp_path / "agents", slurm={"tasks": "node"}, **short),
    ]
    jobs = [run.submit() for run in runs]
    for run, job in zip(runs, jobs, strict=True):
        state = run.finish(job)
        assert (state.state, state.exit_code) == ("COMPLETED", 0), run.log()
        # The schedule's length is the run's, so the rate and with it later losses differ from the long run's.
        assert losses(run.workplace) == losses(runs[0].workplace)
    local = make_workplace(tmp_path / "local", parallel=PARALLEL, train=LONG | short["train"], checkpoint=OFTEN)
    assert local.train().code == 0
    assert losses(local) == losses(runs[0].workplace)
    assert "preflight: ring of 2 nodes" in runs[0].log()
    status = runs[0].trimaran("status", "run")
    assert "completed, on n" in status.out
    assert "step 20 of 20" in status.out
    assert "step 20/20" in runs[0].trimaran("logs", "run").out
    assert (runs[0].run / "report.html").exists()


def test_a_job_that_nears_its_limit_saves_is_requeued_and_goes_on_as_if_nothing_had_been(
    cluster: Cluster, expected: list[Any], tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path)
    job = run.submit()
    run.wait_for_step(20)
    cluster.call("scancel", "--signal=USR1", job)  # what --signal=USR1@SECONDS does before the limit
    state = run.finish(job)
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert losses(run.workplace) == expected
    assert "resuming at step" in run.log()


def test_a_job_whose_node_is_lost_goes_on_elsewhere(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, slurm={"exclude": "n1"})
    job = run.submit()
    run.wait_for_step(60)
    lost = run.cluster.call("scontrol", "show", "hostnames", run.state(job).nodes).split()[-1]
    cluster.lose_node(lost)
    try:
        run.cluster.wait_for("the requeue", lambda: run.state(job).restarts == 1, JOB_S)
        state = run.finish(job)
    finally:
        cluster.start()
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert losses(run.workplace) == expected
    assert "it was killed (out of memory, perhaps), or its host is lost" in run.log()


def test_cancelling_saves_and_the_run_can_go_on(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path)
    job = run.submit()
    run.wait_for_step(20)
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm")
    assert refused.code != 0
    assert "is of this run already; `trimaran cancel" in refused.err
    outcome = run.trimaran("cancel", "run")
    assert outcome.code == 0, outcome.err
    assert "the ranks save and leave" in outcome.err
    state = run.finish(job)
    assert state.exit_code == 143, run.log()
    saved = latest(run.run / "checkpoints")
    assert saved is not None
    assert 20 <= (step_of(saved) or 0) < 400
    assert (step_of(saved) or 0) % 50 != 0, "saved on the way out, not by the interval"
    state = run.finish(run.submit())
    assert state.state == "COMPLETED", run.log()
    assert losses(run.workplace) == expected


def test_scancel_saves_too(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, train={"num_steps": 20000})
    job = run.submit()
    run.wait_for_step(10)
    cluster.call("scancel", job)
    assert run.finish(job).state == "CANCELLED"
    saved = latest(run.run / "checkpoints")
    assert saved is not None, run.log()
    cluster.wait_for("the ranks' end", lambda: not [process for process in cluster.steps() if process.name().startswith("trimaran-")], 60)


SLOW = """
import os
if os.environ.get("SLURMD_NODENAME") == "n1":
    import trimaran.launchers.slurm.preflight as preflight
    preflight.matrix_gflops = lambda spec: 0.5
"""


def test_a_slow_node_is_named_left_out_and_replaced(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(
        textwrap.dedent(SLOW).replace("import trimaran.launchers.slurm.preflight as preflight", HOOK)
    )
    prolog = [f"export PYTHONPATH={tmp_path}/fault"]
    run = Run(
        cluster, tmp_path / "run-place", train={"num_steps": 10}, slurm={"preflight": True, "nodes": 2, "prolog": prolog, "exclude": "n4"}
    )
    job = run.submit()
    state = run.finish(job)
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert "node n1 is not used: a matrix product at " in run.log()
    assert "n1" not in cluster.call("scontrol", "show", "hostnames", state.nodes).split()


# The module that a node runs as a program has another name there: the function is replaced where it looks for torch.
HOOK = """import torch
    class Slow:
        def __matmul__(self, other):
            import time
            time.sleep(3.0)
            return torch.zeros(1, 1)
    torch.randn = lambda *size, **options: Slow()
    preflight = type('', (), {})"""


def test_a_controller_that_restarts_does_not_disturb_a_run(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    run = Run(cluster, tmp_path)
    job = run.submit()
    run.wait_for_step(20)
    cluster.restart_controller()
    state = run.finish(job)
    assert (state.state, state.restarts) == ("COMPLETED", 0), run.log()
    assert losses(run.workplace) == expected


FAILS = """
import trimaran.launchers.rank as module
real = module.Rank.keep_records

def keep_records(self, logs):
    real(self, logs)
    if self.number == 3:
        import trimaran.runtime.train.loop as loop
        step = loop.train_step

        def train_step(job, *arguments, **options):
            if job.optimizer.num_steps == 5:
                raise KeyError("made to fail")
            return step(job, *arguments, **options)

        loop.train_step = train_step

module.Rank.keep_records = keep_records
"""


def test_a_rank_that_fails_ends_the_job_and_is_named_first(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAILS)
    prolog = [f"export PYTHONPATH={tmp_path}/fault"]
    run = Run(cluster, tmp_path / "run-place", slurm={"prolog": prolog})
    job = run.submit()
    run.wait_for_step(5)
    start = time.monotonic()
    state = run.finish(job)
    assert time.monotonic() - start < 60  # in under 5 s on idle cores
    assert (state.state, state.exit_code) == ("FAILED", 1), run.log()
    said = next(line for line in run.log().splitlines() if line.startswith("error:"))
    assert "rank 3 (host n" in said
    assert "pp 1, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said
    assert "made to fail" in run.trimaran("status", "run").out
    assert "KeyError" in run.trimaran("logs", "run", "--rank", "3").out


def test_an_array_runs_every_combination(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, train={"num_steps": 3}, parallel={"tp": 1, "pp": 2})
    outcome = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--array", "optimizer.lr=1e-3,1e-2", "--array", "seed=1,2")
    assert outcome.code == 0, outcome.err
    folders = [run.run.with_name(f"run-{index}") for index in range(4)]
    for folder in folders:
        job = jobs_of(folder)[-1]["job"]
        cluster.wait_for(f"the end of {job}", lambda job=job: run.state(job).has_ended, JOB_S)  # type: ignore[misc]
    found = [losses(Workplace(folder.parent)) if folder.name == "run" else (folder / "metrics.jsonl").read_text() for folder in folders]
    assert len(set(map(str, found))) == 4


def test_names_that_a_shell_would_run_do_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path, train={"num_steps": 2}, parallel={"tp": 1, "pp": 1}, slurm={"nodes": 1})
    hostile = "run of; touch x & (touch y)"
    outcome = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--set", f"train.output_dir={hostile}")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / hostile
    job = jobs_of(folder)[-1]["job"]
    assert run.finish(job).state == "COMPLETED", (folder / "logs" / f"slurm-{job}.log").read_text()
    assert not {"x", "y"} & {path.name for path in tmp_path.rglob("*")}
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--set", "train.output_dir=$(touch x); rm -rf run")
    assert refused.code == 2
    assert "has characters that an #SBATCH line can't hold" in refused.err
    assert not (tmp_path / "x").exists()


def test_the_script_is_valid_shell(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel=PARALLEL)
    settings = ["slurm.nodes=2", "slurm.modules=[cuda/12.4, 'a b; touch x']", "slurm.container=image.sif", "slurm.cpus_per_task=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = trimaran(workplace.folder, "train", "spec.yaml", "--launcher", "slurm", "--dry-run", *options)
    assert outcome.code == 0, outcome.err
    assert "module load 'a b; touch x'" in outcome.out
    subprocess.run(["bash", "-n"], input=outcome.out, text=True, check=True)
    assert not workplace.run.exists()
