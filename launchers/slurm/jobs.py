"""A run's batch jobs: submit one, record it in the run folder, follow it, end it."""

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trimaran.launchers.slurm.commands import JobState, SlurmError, cancel, state_of, submit
from trimaran.launchers.slurm.node_report import NodeReport
from trimaran.launchers.slurm.sbatch import Job, render
from trimaran.launchers.terminal import writing_output
from trimaran.runtime.files import open_regular, read_json, write_text
from trimaran.runtime.folder_lock import LOCK, holder_of, refuse_if_held
from trimaran.runtime.spec import RunSpec, dump_spec, load_spec

RECORD = "slurm.json"
SUBMITTED_SPEC = "submitted.yaml"
SCRIPT = "job.sh"
_POLL_S = 1.0
_LONGEST_SWEEP = 1000


@dataclass(frozen=True)
class Planned:
    """The runs that one batch script starts: the job, and the folder and spec of every run."""

    job: Job
    runs: Sequence[tuple[Path, RunSpec]]


def plan(spec_path: Path, overrides: list[str], sweep: Sequence[str]) -> Planned:
    """Return the job to submit, without writing anything.

    Args:
        sweep: FIELD=VALUE,VALUE,... for an array of runs, one for every combination; each gets a folder of its own,
            output_dir-0 and so on.

    Raises:
        SpecError: a run of them is not valid.
    """
    first = load_spec(spec_path, overrides)
    base = Path(first.train.output_dir).absolute()
    if not sweep:
        runs = [(base, first)]
    else:
        combinations = _combinations(sweep)
        folders = [base.with_name(f"{base.name}-{index}") for index in range(len(combinations))]
        runs = [
            (folder, load_spec(spec_path, [*overrides, *each, f"train.output_dir={folder}"]))
            for folder, each in zip(folders, combinations, strict=True)
        ]
    arguments = [[str(folder / SUBMITTED_SPEC)] for folder, _ in runs]
    return Planned(Job(runs[0][1], arguments, base, Path.cwd(), sys.executable), runs)


def _combinations(sweep: Sequence[str]) -> list[list[str]]:
    axes = []
    for text in sweep:
        name, equals, values = text.partition("=")
        if not equals or not name or not values:
            raise ValueError(f"--array must be FIELD=VALUE,VALUE,... such as optimizer.lr=1e-3,3e-4; got {text!r}")
        axes.append([f"{name}={value}" for value in values.split(",")])
    found = [list(each) for each in itertools.product(*axes)]
    if len(found) > _LONGEST_SWEEP:
        raise ValueError(f"--array makes {len(found)} runs; at most {_LONGEST_SWEEP} go into one job")
    return found


def submit_run(planned: Planned) -> str:
    """Write the run folders and submit the job; return its number.

    Raises:
        FolderInUse: a process runs in one of the folders.
        SlurmError: a job of one of these runs has not ended, or sbatch refuses.
    """
    for folder, _ in planned.runs:
        for state in states_of(folder):
            if not state.has_ended:
                raise SlurmError(
                    f"{state} is of this run already; `trimaran cancel {shlex.quote(str(folder))}` ends it, or choose "
                    "another train.output_dir"
                )
        refuse_if_held(folder / LOCK, folder)
    script = render(planned.job)
    for folder, spec in planned.runs:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        NodeReport.forget(folder)
        # The submitted spec is what runs, also after a requeue, even if the user's file has changed by then.
        write_text(folder / SUBMITTED_SPEC, dump_spec(spec))
    (planned.job.folder / "logs").mkdir(parents=True, exist_ok=True)
    write_text(planned.job.folder / SCRIPT, script)
    number = submit(script)
    for index, (folder, _) in enumerate(planned.runs):
        job = f"{number}_{index}" if len(planned.runs) > 1 else number
        log = planned.job.folder / "logs" / f"slurm-{job}.log"
        _record(folder, {"job": job, "log": str(log), "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    return number


def _record(folder: Path, entry: dict[str, str]) -> None:
    jobs = [*jobs_of(folder), entry]
    write_text(folder / RECORD, json.dumps({"jobs": jobs}, indent=1))


def jobs_of(folder: Path) -> list[dict[str, str]]:
    """Return the jobs of a run by time of submission, none where it was never submitted."""
    try:
        entries = read_json(folder / RECORD)["jobs"]
        return [{name: str(entry[name]) for name in ("job", "log", "submitted")} for entry in entries]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise SlurmError(f"{folder / RECORD} is damaged ({error}); `squeue --me` names your jobs") from error


def last_job(folder: Path) -> dict[str, str]:
    """Return the newest job of a run.

    Raises:
        SlurmError: it was never submitted.
    """
    jobs = jobs_of(folder)
    if jobs:
        return jobs[-1]
    holder = holder_of(folder)
    if holder is not None:
        raise SlurmError(
            f"{folder} has no batch job: {holder} trains there; `kill {holder.pid}` on that host lets it save and end, "
            "and its output is on its terminal"
        )
    raise SlurmError(
        f"{folder} has no batch job, and no process runs there; `trimaran logs {shlex.quote(str(folder))} --rank 1` "
        "shows what a rank has printed, and `trimaran train SPEC --launcher slurm` submits a job"
    )


def states_of(folder: Path) -> list[JobState]:
    """Return the states of a run's newest job; none where Slurm no longer knows it."""
    jobs = jobs_of(folder)
    state = state_of(jobs[-1]["job"]) if jobs else None
    return [] if state is None else [state]


def follow(entry: dict[str, str], say: Callable[[str], None], out: IO[bytes]) -> JobState:
    """Say every change of a job's state, copy its output, and return its last state.

    Raises:
        SlurmError: Slurm no longer knows the job.
    """
    said, position, log = "", 0, Path(entry["log"])
    while True:
        state = state_of(entry["job"])
        if state is None:
            raise SlurmError(f"Slurm no longer knows job {entry['job']}; its output is in {log}")
        if str(state) != said:
            said = str(state)
            say(said)
        position = copy_from(log, position, out)
        if state.has_ended:
            return state
        time.sleep(_POLL_S)


def copy_from(file: Path, position: int, out: IO[bytes]) -> int:
    """Copy what a growing file has after `position`; return where it ends now."""
    try:
        with open_regular(file) as source:
            source.seek(position)
            data = source.read()
    except FileNotFoundError:
        return position
    with writing_output():
        out.write(data)
        out.flush()
    return position + len(data)


def end(folder: Path, *, now: bool, patience_s: float, say: Callable[[str], None]) -> None:
    """End the run's newest job after its ranks have saved.

    Args:
        now: cancel at once; the ranks then have only Slurm's KillWait to save.
        patience_s: how long the ranks may take to save before the job is cancelled.

    Raises:
        SlurmError: the run has no job, or Slurm does not answer.
    """
    job = last_job(folder)["job"]
    state = state_of(job)
    if state is None or state.has_ended:
        say(f"job {job} has ended already" if state is None else f"{state}: nothing to cancel")
        return
    if not now and state.state == "RUNNING":
        cancel([job], signal="TERM")
        say(f"job {job}: the ranks save and leave")
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            state = state_of(job)
            if state is None or state.has_ended:
                say(f"{state}" if state else f"job {job} has ended")
                return
            time.sleep(_POLL_S)
    cancel([job])
    say(f"job {job} is cancelled")
