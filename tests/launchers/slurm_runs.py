"""Runs that are batch jobs of a real Slurm."""

import subprocess
from pathlib import Path
from typing import Any

from tests.launchers.runs import TRIMARAN, Hold, make_workplace
from tests.launchers.slurm_cluster import Cluster
from trimaran.launchers.slurm.commands import parse_state
from trimaran.launchers.slurm.jobs import jobs_of

TWO_RANKS, FOUR_RANKS = {"tp": 2, "pp": 1}, {"tp": 2, "pp": 2}
STEPS = 30
TRAIN = {"num_steps": STEPS, "eval_interval": 0}
OFTEN = {"interval": 10, "keep_last": 20}
JOB_S = 300.0  # twenty seconds on idle cores


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
