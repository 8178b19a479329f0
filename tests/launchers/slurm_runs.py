"""Runs that are batch jobs of a real Slurm."""

import os
import subprocess
from pathlib import Path
from typing import Any

from tests import counting
from tests.launchers.forked import COMMAND_LINE, SOCKET, Forked, fork_server
from tests.launchers.runs import Hold, make_workplace, new_file
from tests.launchers.slurm_cluster import Cluster
from trimaran.launchers.slurm.commands import parse_state
from trimaran.launchers.slurm.jobs import jobs_of

TWO_RANKS, FOUR_RANKS = {"tp": 2, "pp": 1}, {"tp": 2, "pp": 2}
STEPS, MANY_STEPS = 8, 30
TRAIN = {"num_steps": STEPS, "eval_interval": 0}
OFTEN = {"interval": 2, "keep_last": 20}
JOB_S = 400.0  # ten seconds on idle cores
# What every interpreter of a job runs first. The command that submits the job runs it too and is none of them; nor is a
# fork, which has torch by then.
COUNT = f"""
import json, os, sys
if "SLURM_JOB_ID" in os.environ and "{counting.FOLDER}" in os.environ and "torch" not in sys.modules:
    entry = {{"kind": "slurm process", "detail": os.environ.get("SLURM_JOB_NAME", ""), "count": 1}}
    with open(f"{{os.environ['{counting.FOLDER}']}}/{{os.getpid()}}.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\\n")
"""


class Run:
    """A workplace whose run is a batch job; with `hold` one that waits before the step after it.

    Args:
        forked: whether the job's interpreters are forked, where a test does not turn on who ends or binds them.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        hold: int | None = None,
        forked: bool = False,
        environment: dict[str, str] | None = None,
        **sections: dict[str, Any],
    ) -> None:
        defaults: dict[str, dict[str, Any]] = {
            "parallel": TWO_RANKS,
            "train": TRAIN,
            "checkpoint": OFTEN,
            "slurm": {"preflight_min_free_gib": None},
            # ranks wait for the one that is held
            "launcher": {"nodes": 2, "start_timeout_s": 120.0, "timeout_s": 600.0},
        }
        for name, fields in sections.items():
            defaults[name] = defaults.get(name, {}) | fields
        if forked:  # the lines of the prolog come after the one that sets the interpreter
            python = fork_server().shim
            prolog = [f"export {SOCKET}={os.environ[SOCKET]}", f"python={python}"]
            defaults["slurm"] = defaults["slurm"] | {"prolog": prolog}
        self.cluster, self.workplace = cluster, make_workplace(folder, **defaults)
        self.run = self.workplace.run
        self.hold: Hold | None = None
        self.environment = cluster.environment | (environment or {})
        self.hold_at(hold)

    def hold_at(self, step: int | None) -> None:
        """Have jobs that are submitted from now on wait before the step after `step`."""
        self.hold = None if step is None else Hold(self.workplace.folder / f"hold-{step}", step)
        self.environment |= self.hold.environment if self.hold else {}
        self._count_interpreters(self.workplace.folder)

    def _count_interpreters(self, folder: Path) -> None:
        """Have every interpreter of the run's jobs counted, beside what a fault of the test has them run."""
        place = Path(self.environment.get("PYTHONPATH", folder / "count"))
        place.mkdir(exist_ok=True)
        file = place / "sitecustomize.py"
        before = file.read_text() if file.exists() else ""
        file.write_text(COUNT + before.removeprefix(COUNT))
        self.environment["PYTHONPATH"] = str(place)

    def trimaran(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command, forked; the job's ranks work in the same folder and are none of its own."""
        fork_server()
        words = ["-m", COMMAND_LINE, *arguments]
        folder = self.workplace.folder
        with new_file(folder / "out") as out, new_file(folder / "err") as err, Path("/dev/null").open() as nothing:
            descriptors = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
            code = Forked(words, folder, descriptors, self.environment).wait(JOB_S)
            texts = [Path(file.name).read_text() for file in (out, err)]
        return subprocess.CompletedProcess(words, code, *texts)

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
