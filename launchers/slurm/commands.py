"""Calls of Slurm's commands sbatch, scontrol and scancel, and reading their output.

sacct is not used, because many clusters keep no accounts.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from trimaran.launchers.env.exit_codes import exit_code_after

_TIMEOUT_S = 60
_ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip

# Part of what a command says when it refuses -> what to change.
_REMEDIES = {
    "partition": "set slurm.partition to one that `sinfo` lists",
    "account": "set slurm.account to one of yours (`sacctmgr show associations user=$USER`)",
    "qos": "set slurm.qos to one of yours (`sacctmgr show associations user=$USER`)",
    "time limit": "lower slurm.time to what the partition allows (`sinfo -o '%P %l'`)",
    "configuration is not available": "lower launcher.nodes, slurm.gpus_per_node, cpus_per_task or memory to what "
    "`sinfo -N -l` shows",
    "more processors": "lower the ranks of a node (launcher.nodes, parallel) or slurm.cpus_per_task",
    "gres": "set slurm.gpus_per_node to what `sinfo -o '%N %G'` shows",
    "node name": "take the wrong names out of slurm.exclude",
    "feature": "set slurm.constraint to features that `sinfo -o '%N %f'` shows",
    "reservation": "set slurm.reservation to one that `scontrol show reservation` lists",
    "contact slurm controller": "ask those who run the cluster, or try again when `scontrol ping` says UP",
}


class SlurmError(RuntimeError):
    """A command of Slurm is missing, failed or does not answer; the message has its output."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Args:
        state: Slurm's name of it, such as PENDING, RUNNING or COMPLETED.
        reason: why it is pending, or why it ended; "" for none.
        nodes: the list in Slurm's short form, "" while there is none.
        restarts: how often it was requeued.
        exit_code: of the batch script; None while it runs.
        start: when it began or will begin, as Slurm writes it; "" where it does not know.
    """

    job: str
    state: str
    reason: str
    nodes: str
    restarts: int
    exit_code: int | None
    start: str

    @property
    def has_ended(self) -> bool:
        """Whether the job will not run again by itself."""
        return self.state in _ENDED

    @property
    def is_pending(self) -> bool:
        """Whether it waits for its turn."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")

    def __str__(self) -> str:
        words = [f"job {self.job}", self.state.lower().replace("_", " ")]
        if self.is_pending and self.reason:
            words.append(f"because of {self.reason}")
        if self.is_pending and self.start:
            words.append(f"start expected at {self.start}")
        if self.nodes:
            words.append(f"on {self.nodes}")
        if self.restarts:
            words.append(f"restarted {self.restarts} time{'s' if self.restarts > 1 else ''}")
        if self.has_ended and self.exit_code:
            words.append(f"exit code {self.exit_code}")
        return ", ".join(words)


def submit(script: str) -> str:
    """Submit a batch script; return the job's number (with `;cluster` where Slurm names one)."""
    printed = call(["sbatch", "--parsable"], text=script)
    job = printed.strip().splitlines()[-1] if printed.strip() else ""
    if not re.fullmatch(r"\d+(;\S+)?", job):
        raise SlurmError(f"sbatch printed no job number, but {printed.strip()!r}")
    return job.partition(";")[0]


def state_of(job: str) -> JobState | None:
    """Return what Slurm says of a job, None where it knows none of that number (any more)."""
    try:
        shown = call(["scontrol", "show", "job", job, "--oneliner"])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return parse_state(shown.splitlines()[0])


def parse_state(line: str) -> JobState:
    """Read one line of `scontrol show job --oneliner`."""
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))

    def known(name: str) -> str:
        value = fields.get(name, "")
        return "" if value in ("(null)", "None", "Unknown", "N/A") else value

    state = fields.get("JobState", "UNKNOWN")
    # For a task of an array, the form that scancel and squeue take.
    job = (
        f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
        if fields.get("ArrayTaskId", "").isdigit()
        else fields.get("JobId", "?")
    )
    code, _, number = known("ExitCode").partition(":")
    ended_by = exit_code_after(int(number)) if number not in ("", "0") else 0
    exit_code = (int(code) or ended_by) if code.isdigit() else None
    return JobState(
        job=job,
        state=state,
        reason=known("Reason"),
        nodes=known("NodeList"),
        restarts=int(known("Restarts") or 0),
        exit_code=exit_code if state in _ENDED else None,
        start=known("StartTime"),
    )


def cancel(jobs: Sequence[str], signal: str | None = None) -> None:
    """Cancel jobs; with `signal`, only send that signal to their steps, which then exit by themselves."""
    call(["scancel", *([f"--signal={signal}"] if signal else []), *jobs])


def call(words: Sequence[str], *, text: str | None = None) -> str:
    """Run a command of Slurm and return what it printed.

    Raises:
        SlurmError: it is not installed, does not answer within a minute, or failed.
    """
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]} is not on this machine's PATH; run this where jobs are submitted (a login node), "
            "or load Slurm's module"
        )
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} did not answer within {_TIMEOUT_S} s; is Slurm's controller up? (scontrol ping)"
        ) from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        said = "; ".join(line.removeprefix(f"{words[0]}: ").removeprefix("error: ") for line in lines)
        fix = next((f"; {fix}" for part, fix in _REMEDIES.items() if part in said.lower()), "")
        raise SlurmError(f"{words[0]} failed: {said}{fix}")
    return done.stdout
