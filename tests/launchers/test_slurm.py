"""Runs on a real Slurm of six nodes give the local launcher's losses, whatever happens to nodes and jobs.

Nothing sleeps for a fixed time: states are waited for, and rank 0 is held at a step where something shall happen to a
run that is under way.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.launchers.forked import COMMAND_LINE, SOCKET, fork_server
from tests.launchers.runs import RAISE_AT_STEP_6, fault, losses, make_workplace, ranks_in, trimaran
from tests.launchers.slurm_cluster import Cluster, running_cluster, why_not
from tests.launchers.slurm_runs import FOUR_RANKS, JOB_S, MANY_STEPS, OFTEN, STEPS, TRAIN, TWO_RANKS, Run
from trimaran.launchers.slurm.commands import parse_state
from trimaran.launchers.slurm.jobs import jobs_of, plan
from trimaran.launchers.slurm.sbatch import render
from trimaran.runtime.checkpoint.folder import latest
from trimaran.runtime.plan.calibrate.record import read_machine
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.tune.study import Study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
SECRET = "hunter2-of-the-hub"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=6, cpus=16) as cluster:
        yield cluster


def train_here(folder: Path, parallel: dict[str, int], num_steps: int) -> list[Any]:
    """Losses and norms of the run through the local launcher."""
    workplace = make_workplace(folder, parallel=parallel, train=TRAIN | {"num_steps": num_steps}, checkpoint=OFTEN)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return losses(workplace)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return train_here(tmp_path_factory.mktemp("two"), TWO_RANKS, STEPS)


@pytest.fixture(scope="module")
def expected_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return train_here(tmp_path_factory.mktemp("four"), FOUR_RANKS, MANY_STEPS)


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A job on its own nodes, held at a step until Slurm's signal before its time limit. Other tests run meanwhile.

    The controller restarts while it is held: the job goes on, and the signal still comes.
    """
    run = Run(
        cluster,
        tmp_path_factory.mktemp("limited"),
        hold=5,
        slurm={"time": "3", "signal_lead_s": 60, "exclude": "n[3-6]"},  # Slurm signals up to a minute earlier
    )
    job = run.submit_and_hold()
    cluster.restart_controller(job)
    assert (run.state(job).state, run.state(job).restarts) == ("RUNNING", 0), run.log()
    return run, job


def test_tasks_of_ranks_and_agents_give_the_losses_of_the_local_launcher(
    cluster: Cluster, expected_of_four: list[Any], tmp_path: Path
) -> None:
    """Two jobs at once on the same nodes; the ranks of `limited` start cold."""
    where = {"exclude": "n[1-2],n[5-6]"}
    both: dict[str, Any] = {"parallel": FOUR_RANKS, "train": {"num_steps": MANY_STEPS}, "forked": True}
    runs = [
        Run(cluster, tmp_path / "ranks", slurm=where, **both),
        Run(cluster, tmp_path / "agents", slurm={"tasks": "node", **where}, **both),
    ]
    jobs = [run.submit() for run in runs]
    for run, job in zip(runs, jobs, strict=True):
        state = run.finish(job)
        assert (state.state, state.exit_code) == ("COMPLETED", 0), run.log()
        assert losses(run.workplace) == expected_of_four
        assert not list(run.run.glob(".meet-*")), "the file with rank 0's address is removed"
    status = runs[0].trimaran("status", "run")
    assert "completed, on n" in status.stdout
    assert f"step {MANY_STEPS} of {MANY_STEPS}" in status.stdout
    assert f"step {MANY_STEPS}/{MANY_STEPS}" in runs[0].trimaran("logs", "run").stdout
    assert (runs[0].run / "report.html").exists()


def test_a_job_whose_node_is_lost_goes_on_elsewhere(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    """Its ranks are forked: with the program that stands for one on the lost node, the fork server ends that one."""
    run = Run(cluster, tmp_path, hold=5, forked=True, slurm={"exclude": "n[1-2]"})
    job = run.submit_and_hold()
    lost = cluster.call("scontrol", "show", "hostnames", run.state(job).nodes).split()[-1]
    cluster.lose_node(lost)
    run.release()
    try:
        cluster.wait_for("the job to ask for others", lambda: f", without n[1-2],{lost}" in run.log(), JOB_S)
        cluster.mark_down(lost)
        cluster.wait_for("the requeue", lambda: run.state(job).restarts == 1, JOB_S)
        state = run.finish(job)
    finally:
        cluster.start()
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert losses(run.workplace) == expected
    assert "it was killed (out of memory, perhaps), or its host is lost" in run.log()


def test_cancelling_saves_and_the_run_can_go_on(cluster: Cluster, expected: list[Any], tmp_path: Path) -> None:
    """By `trimaran cancel` first, and by scancel when the run has gone on."""
    run = Run(cluster, tmp_path, hold=2, forked=True)
    job = run.submit_and_hold()
    refused = run.trimaran("train", "spec.yaml", "--launcher", "slurm")
    assert refused.returncode != 0
    assert "is of this run already; `trimaran cancel" in refused.stderr
    outcome = run.trimaran("cancel", "run")
    assert outcome.returncode == 0, outcome.stderr
    assert "the ranks save and leave" in outcome.stderr
    assert run.finish(job).exit_code == 143, run.log()
    assert (latest(run.run / "checkpoints") or Path()).name == "step-00000003"

    run.hold_at(5)
    job = run.submit_and_hold()
    mine = ranks_in(tmp_path)
    assert len(mine) == 2
    cluster.call("scancel", job)
    assert run.finish(job).state == "CANCELLED"
    cluster.wait_for("the ranks' end", lambda: not any(process.is_running() for process in mine), JOB_S)
    assert "resuming at step 3" in run.log()
    assert (latest(run.run / "checkpoints") or Path()).name == "step-00000006", run.log()
    assert losses(run.workplace) == expected[:6]


# A matrix product is slow on one node, and the disk of another is full.
BAD_NODES = """
import os

if os.environ.get("SLURMD_NODENAME") == "n3":
    import time

    import torch

    real = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda self, other: (time.sleep(0.3), real(self, other))[1]
if os.environ.get("SLURMD_NODENAME") == "n4":
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
        forked=True,
        environment=environment,
        train={"num_steps": 4},
        launcher={"nodes": 3},
        slurm={"preflight_min_free_gib": 1.0, "exclude": "n1"},
        parallel={"tp": 3, "pp": 1},
        model={"num_heads": 3, "hidden_size": 24, "ffn_hidden_size": 24},
    )
    state = run.finish(run.submit())
    assert (state.state, state.restarts) == ("COMPLETED", 1), run.log()
    assert "preflight: ring of 3 nodes" in run.log()
    assert "node n3 is not used: a matrix product at " in run.log()
    assert "node n4 is not used: 0.0 GiB free in the run folder" in run.log()
    assert not {"n1", "n3", "n4"} & set(cluster.call("scontrol", "show", "hostnames", state.nodes).split())


def test_a_rank_that_fails_ends_the_job_is_named_first_and_secrets_stay_in_the_environment(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(
        cluster,
        tmp_path,
        forked=True,
        environment=fault(tmp_path, RAISE_AT_STEP_6, rank=1) | {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET},
    )
    state = run.finish(run.submit())
    assert (state.state, state.exit_code) == ("FAILED", 1), run.log()
    said = next(line for line in run.log().splitlines() if line.startswith("error:"))
    assert "rank 1 (host n" in said
    assert "pp 0, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said
    assert "made to fail" in run.trimaran("status", "run").stdout
    assert "KeyError" in run.trimaran("logs", "run", "--rank", "1").stdout
    assert [file for file in run.run.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()] == []


def test_names_that_a_shell_would_run_do_nothing(cluster: Cluster, tmp_path: Path) -> None:
    sections = {"train": {"num_steps": 2}, "parallel": {"tp": 1, "pp": 1}, "launcher": {"nodes": 1}}
    run = Run(cluster, tmp_path, forked=True, **sections)
    hostile = "run of; touch x & (touch y)"
    outcome = run.trimaran("train", "spec.yaml", "--launcher", "slurm", "--set", f"train.output_dir={hostile}")
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / hostile
    job = jobs_of(folder)[-1]["job"]
    assert run.finish(job).state == "COMPLETED", (folder / "logs" / f"slurm-{job}.log").read_text()
    assert not {"x", "y"} & {path.name for path in tmp_path.rglob("*")}
    refused = run.trimaran(
        "train", "spec.yaml", "--launcher", "slurm", "--set", "train.output_dir=$(touch x); rm -rf run"
    )
    assert refused.returncode == 2
    assert "has characters that an #SBATCH line can't hold" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_a_calibration_under_srun_tells_apart_what_crosses_nodes(cluster: Cluster, tmp_path: Path) -> None:
    srun = ["srun", "-N2", "-n4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", f"--chdir={tmp_path}"]
    command = [str(fork_server().shim), "-m", COMMAND_LINE, "calibrate", "--smoke", "--dtype", "float32"]
    told = cluster.call(*srun, f"--export=ALL,{SOCKET}={os.environ[SOCKET]}", *command, "--output", "chip.json")
    assert "measuring 4 ranks at once on 2 nodes" in told
    assert "between nodes: " in told
    machine = read_machine(tmp_path / "chip.json")
    assert {(each.ranks, each.nodes) for each in machine.exchanges if each.axis == "dp"} == {(2, 1), (4, 2), (2, 2)}
    assert {each.ranks for each in machine.rates} == {1, 2}, "one process, and the ranks of a node"
    assert [file.name for file in tmp_path.iterdir()] == ["chip.json"], "where the ranks met is gone"


def test_the_script_is_valid_shell(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, parallel=FOUR_RANKS)
    settings = [
        "launcher.nodes=2",
        "slurm.modules=[cuda/12.4, 'a b; touch x']",
        "slurm.container=image.sif",
        "slurm.cpus_per_task=2",
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = trimaran(workplace.folder, "train", "spec.yaml", "--launcher", "slurm", "--dry-run", *options)
    assert outcome.code == 0, outcome.err
    assert "module load 'a b; touch x'" in outcome.out
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in outcome.out
    assert "trimaran.launchers.slurm.preflight" in outcome.out
    without = plan(workplace.folder / "spec.yaml", ["slurm.preflight_min_free_gib=null"], [])
    assert "trimaran.launchers.slurm.preflight" not in render(without.job)
    assert "#SBATCH --propagate=NONE" in outcome.out, "the limits of the login shell stay there"
    subprocess.run(["bash", "-n"], input=outcome.out, text=True, check=True)
    assert not workplace.run.exists()


def test_a_rank_that_is_killed_ends_the_job_though_the_others_would_wait_for_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, hold=3, forked=True, launcher={"timeout_s": 100_000.0})
    job = run.submit_and_hold()
    _, victim = ranks_in(tmp_path)
    victim.kill()
    state = run.finish(job)
    assert (state.state, state.exit_code) == ("FAILED", 137), run.log()
    assert "error: rank 1 (host n" in run.log()


def test_a_search_goes_on_after_a_lost_node_and_scancel(cluster: Cluster, tmp_path: Path) -> None:
    """In the middle of two trials a node fails, then both workers are cancelled; all four trials train alike."""
    run = Run(
        cluster,
        tmp_path,
        hold=3,
        forked=True,
        slurm={"exclude": "n[1-2]"},
        parallel={"tp": 1},
        launcher={"nodes": 1},
        train={"eval_interval": 4},
    )
    search = {
        "base": "spec.yaml",
        "output_dir": "study",
        "space": {"logging.interval": [1, 2, 3, 4]},
        "search": {"sampler": "grid"},
        "parallel_trials": 2,
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(search))
    printed = run.trimaran("tune", "tune.yaml", "--launcher", "slurm", "--dry-run").stdout
    assert "--array=0-1" in printed
    assert "trimaran.launchers.tune.worker" in printed
    study, place = Study(tmp_path / "study", {}), tmp_path / "study" / "workers" / "0"

    def logs() -> str:
        return "".join(file.read_text() for file in (tmp_path / "study" / "logs").glob("slurm-*.log"))

    def submit() -> str:
        outcome = run.trimaran("tune", "tune.yaml", "--launcher", "slurm")
        assert outcome.returncode == 0, outcome.stderr
        return jobs_of(place)[-1]["job"].partition("_")[0]

    def workers(job: str) -> list[Any]:
        return [parse_state(line) for line in cluster.call("scontrol", "show", "job", job, "--oneliner").splitlines()]

    def has_ended(job: str) -> bool:
        return all(worker.has_ended for worker in workers(job))

    def held() -> bool:
        trials = study.read().trials
        return len(trials) == 2 and all(len(steps_of(study.run_folder(trial))) == 3 for trial in trials)

    job = submit()
    cluster.wait_for("two trials to hold", held, JOB_S)
    (node,) = {worker.nodes for worker in workers(job)}
    there = psutil.process_iter(["name", "cwd"])
    ranks = [each for each in there if (each.info["name"], each.info["cwd"]) == ("trimaran-0", str(tmp_path))]
    assert len(ranks) == 2
    for rank in ranks:  # forks of the fork server, not of the node's daemon
        rank.suspend()
    cluster.lose_node(node, silently=True)
    for rank in ranks:
        rank.kill()
    cluster.mark_down(node)
    try:
        again = "both workers to start on another node"
        cluster.wait_for(again, lambda: logs().count("resuming at step 2") == 2, JOB_S)
    finally:
        cluster.start()
    assert [(worker.restarts, worker.nodes == node) for worker in workers(job)] == [(1, False)] * 2
    cluster.call("scancel", job)
    cluster.wait_for("the end of the workers", lambda: has_ended(job), JOB_S)
    assert [trial.state for trial in study.read().trials] == ["running"] * 2
    run.release()
    job = submit()
    cluster.wait_for("the end of the search", lambda: has_ended(job), JOB_S)
    trials = study.read().trials
    assert [trial.state for trial in trials] == ["complete"] * 4, logs()
    assert logs().count("resuming at step 4") == 2, logs()
    assert len({trial.objectives for trial in trials}) == 1
    assert len({tuple(steps_of(study.run_folder(trial))) for trial in trials}) == 1


def test_a_job_that_reaches_its_time_limit_saves_is_requeued_and_goes_on_as_if_nothing_had_been(
    limited: tuple[Run, str], expected: list[Any]
) -> None:
    """Last in this file: the limit is minutes away when the others begin."""
    run, job = limited
    state = run.finish(job)
    assert state.state == "COMPLETED", run.log()
    assert state.restarts > 0
    assert losses(run.workplace) == expected
    assert "resuming at step 6" in run.log()


def steps_of(folder: Path) -> list[tuple[Any, Any]]:
    """Step and loss of every training row of a run, none before it begins."""
    file = folder / "metrics.jsonl"
    return [(row["step"], row["loss"]) for row in read_metrics(file) if "loss" in row] if file.exists() else []
