"""`trimaran train` with ranks that another program starts: a batch job of Slurm's, or mpirun."""

import shutil
import subprocess
import sys
from pathlib import Path

import typer

from trimaran.launchers.cli.console import say
from trimaran.launchers.slurm.jobs import follow, last_job, plan, submit_run
from trimaran.launchers.slurm.sbatch import render
from trimaran.runtime.spec import RunSpec


def train_on_slurm(spec_path: Path, overrides: list[str], array: list[str], *, dry_run: bool, following: bool) -> None:
    """Submit a run, or one for each combination of `array`; with `dry_run` print the script, with `following` stay until the job ends.

    Raises:
        SpecError, ScriptError, SlurmError: the run can't be submitted.
    """
    planned = plan(spec_path, overrides, array)
    if dry_run:
        print(render(planned.job), end="")
        return
    if following and array:
        raise ValueError("--follow is for one run; look at those of an array by `trimaran status RUN`")
    number = submit_run(planned)
    folders = ", ".join(str(folder) for folder, _ in planned.runs)
    say(f"job {number} submitted; run folder{'s' if array else ''} {folders}")
    folder = planned.runs[0][0]
    if not following:
        say(f"see trimaran status {folder}, trimaran logs {folder} --follow, trimaran cancel {folder}")
        return
    try:
        state = follow(last_job(folder), say, sys.stdout.buffer)
    except KeyboardInterrupt:
        say(f"job {number} goes on; trimaran logs {folder} --follow shows it again")
        return
    raise typer.Exit(state.exit_code or (0 if state.state == "COMPLETED" else 1))


def train_by_mpi(spec: RunSpec, spec_path: Path, overrides: list[str]) -> None:
    """Start the ranks on this machine by mpirun; on several, write `mpirun -n N --host ... trimaran train SPEC` yourself.

    Raises:
        ValueError: there is no mpirun.
    """
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin") or shutil.which(
        "mpirun"
    )
    if mpirun is None:
        raise ValueError(
            "mpirun is not on this machine's PATH; load a module of an MPI, or pip install mpich, or use --launcher local"
        )
    words = [word for override in overrides for word in ("--set", override)]
    command = [
        mpirun,
        "-n",
        str(spec.world_size),
        sys.executable,
        "-m",
        "trimaran.launchers.worker.entry",
        str(spec_path),
        *words,
    ]
    done = subprocess.run([*command, "--launcher", "mpi"], check=False)
    raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
