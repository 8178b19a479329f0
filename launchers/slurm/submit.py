"""`trimaran train --launcher slurm`: submit a run as a batch job, and follow the job where the user wants that."""

import shlex
import sys
from pathlib import Path

from trimaran.launchers.slurm.jobs import follow, last_job, plan, submit_run
from trimaran.launchers.slurm.sbatch import render
from trimaran.launchers.terminal import say, writing_output


def train_on_slurm(spec_path: Path, overrides: list[str], array: list[str], *, dry_run: bool, following: bool) -> int:
    """Submit a run, or one for each combination of `array`, and return the command's exit code.

    Args:
        dry_run: print the batch script instead.
        following: show the job until it ends; the exit code is then the job's.

    Raises:
        SpecError, ScriptError, SlurmError: the run can't be submitted.
    """
    planned = plan(spec_path, overrides, array)
    if dry_run:
        with writing_output():
            print(render(planned.job), end="")
        return 0
    if following and array:
        raise ValueError("--follow is for one run; look at those of an array by `trimaran status RUN`")
    number = submit_run(planned)
    folders = ", ".join(str(folder) for folder, _ in planned.runs)
    say(f"job {number} submitted; run folder{'s' if array else ''} {folders}")
    folder = planned.runs[0][0]
    run = shlex.quote(str(folder))
    if not following:
        say(f"see trimaran status {run}, trimaran logs {run} --follow, trimaran cancel {run}")
        return 0
    try:
        state = follow(last_job(folder), say, sys.stdout.buffer)
    except KeyboardInterrupt:
        say(f"job {number} goes on; trimaran logs {run} --follow shows it again")
        return 0
    return state.exit_code or (0 if state.state == "COMPLETED" else 1)
