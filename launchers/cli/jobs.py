"""`trimaran status | logs | cancel RUN`: a run's batch job, as Slurm and the run folder describe it. No torch."""

import math
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.cli.common.local_output import is_newest, print_output
from trimaran.launchers.run_folder import require_run
from trimaran.launchers.slurm.commands import state_of
from trimaran.launchers.slurm.jobs import copy_from, end, follow, jobs_of, last_job
from trimaran.launchers.terminal import say, writing_output
from trimaran.models.fields import printable
from trimaran.runtime.pages.run_folder import last_failure

RunFolder = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A run folder.")]
_SAVING_S = 600.0
_POLL_S = 1.0


def status(run: RunFolder) -> None:
    """Say what a run's batch job does, and how far the run is."""
    with errors_as_sentences():
        require_run(run)
        lines = [
            str(state_of(job) or f"job {job}: Slurm no longer knows it (submitted {submitted})")
            for job, submitted in ((entry["job"], entry["submitted"]) for entry in jobs_of(run)[-1:])
        ]
        with writing_output():
            print(*(printable(line) for line in [*lines, *_progress(run)]), sep="\n")


def logs(
    run: RunFolder,
    rank: Annotated[
        int | None, typer.Option(help="The output of this rank of the newest start, in place of the job's.", min=0)
    ] = None,
    following: Annotated[
        bool, typer.Option("--follow", help="Go on until the job or start has ended; Ctrl-C leaves it alone.")
    ] = False,
) -> None:
    """Print the output of a run's newest batch job or local start, or of one of its ranks."""
    with errors_as_sentences():
        _require(run)
        if rank is not None:
            _print_rank(run, rank)
        elif is_newest(run):
            print_output(run, sys.stdout.buffer, following=following)
        elif following:
            raise typer.Exit(follow(last_job(run), say, sys.stdout.buffer).exit_code or 0)
        else:
            log = Path(last_job(run)["log"])
            if not copy_from(log, 0, sys.stdout.buffer):
                say(f"{log} is empty or not there yet")


def cancel(
    run: RunFolder,
    now: Annotated[
        bool, typer.Option("--now", help="Don't wait for the ranks to save; Slurm gives them its KillWait.")
    ] = False,
) -> None:
    """End a run's batch job; its ranks save first."""
    with errors_as_sentences():
        _require(run)
        end(run, now=now, patience_s=_SAVING_S, say=say)


def _require(run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder")


def _print_rank(run: Path, rank: int) -> None:
    found = sorted(run.glob(f"logs/*/rank-{rank}"), key=lambda folder: folder.stat().st_mtime)
    if not found:
        raise ValueError(f"{run / 'logs'} has nothing of rank {rank}")
    for name in ("stdout.log", "stderr.log", "traceback.txt"):
        copy_from(found[-1] / name, 0, sys.stdout.buffer)


def _progress(run: Path) -> list[str]:
    """Return lines about the last step, the last checkpoint and the failure of the newest start."""
    from trimaran.runtime.checkpoint.folder import latest, step_of
    from trimaran.runtime.spec import load_spec
    from trimaran.runtime.train.metrics import read_metrics

    lines = []
    try:
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    except FileNotFoundError:
        rows = []
    if rows:
        row, age = rows[-1], time.time() - (run / "metrics.jsonl").stat().st_mtime
        loss, speed = (math.nan if row.get(name) is None else row[name] for name in ("loss", "tokens_per_second"))
        # A run that somebody has copied in part has no spec.
        total = f" of {load_spec(run / 'spec.yaml').train.num_steps}" if (run / "spec.yaml").exists() else ""
        lines.append(f"step {row['step']}{total}, loss {loss:.4f}, {speed:,.0f} tokens/s, {age:.0f} s ago")
    else:
        lines.append("no step has been finished yet")
    checkpoint = latest(run / "checkpoints")
    if checkpoint is not None:
        lines.append(f"saved: step {step_of(checkpoint)}")
    failure = last_failure(run)
    if failure is not None:
        lines.append(f"last failure: {failure}")
    return lines
