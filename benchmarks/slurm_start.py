"""Seconds of a batch job until its first step: those of Slurm, of imports and of trimaran. Needs a Slurm to submit to.

    python benchmarks/slurm_start.py SPEC [--set FIELD=VALUE ...] [--repeats 3]

Jobs take turns: one trains, the next has as many tasks that import what a rank imports and end. The first training job
prepares the data and is not counted. The preflight is switched off, as it is work of another kind; `--preflight` leaves
it on. Medians are printed, in seconds:

wait      from the submission (the command has said the job's number) to the first line of the batch script: Slurm's own
to step   from there to the first finished step in metrics.jsonl
imports   from the first line of the other job's script to the end of its tasks: srun, Python, torch
beyond    to step - imports
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trimaran.launchers.slurm.commands import submit
from trimaran.runtime.spec import RunSpec, load_spec

POLL_S = 0.01
LONGEST_S = 600.0
HEADER = ("ranks", "nodes", "wait", "to step", "imports", "beyond")


def main() -> None:
    """Run the jobs and print the table."""
    options = _parser().parse_args()
    overrides = [*options.overrides, "train.num_steps=2", "lr_schedule.warmup_steps=0", "train.eval_interval=0"]
    spec = load_spec(options.spec, [*overrides, "train.output_dir=runs/slurm-start"])
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="slurm-start-") as name:
        folder = Path(name)
        _train(options.spec, overrides, folder / "first", preflight=options.preflight)
        waits, steps, imports = [], [], []
        for index in range(options.repeats):
            wait, step = _train(options.spec, overrides, folder / f"train-{index}", preflight=options.preflight)
            waits.append(wait)
            steps.append(step)
            imports.append(_import(spec, folder / f"import-{index}"))
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    times = [statistics.median(each) for each in (waits, steps, imports)]
    figures = [f"{seconds:.1f}" for seconds in (*times, times[1] - times[2])]
    print(f"| {spec.world_size} | {spec.launcher.nodes} | {' | '.join(figures)} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, metavar="SPEC")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preflight", action="store_true")
    return parser


def _train(spec: Path, overrides: list[str], folder: Path, *, preflight: bool) -> tuple[float, float]:
    """Submit a run; return the seconds until its script began, and from there to its first step."""
    folder.mkdir()
    began, run = folder / "began", folder / "run"
    prolog = [f"date +%s.%N >{shlex.quote(str(began))}", *load_spec(spec, overrides).slurm.prolog]
    settings = [
        *overrides,
        f"train.output_dir={run}",
        *([] if preflight else ["slurm.preflight_min_free_gib=null"]),
        f"slurm.prolog={json.dumps(prolog)}",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "trimaran.launchers.cli.app", "train", str(spec), "--launcher", "slurm", *words],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    submitted = time.time()
    metrics = run / "metrics.jsonl"
    _wait(f"a step of {run}", lambda: metrics.exists() and metrics.stat().st_size > 0)
    stepped, started = metrics.stat().st_mtime, float(began.read_text())
    _wait(f"the end of {run}", (run / "report.html").exists)
    return max(0.0, started - submitted), stepped - started


def _import(spec: RunSpec, folder: Path) -> float:
    """Run a job whose tasks only import what a rank imports; return its seconds."""
    folder.mkdir()
    times = folder / "times"
    clock = f"date +%s.%N >>{shlex.quote(str(times))}"
    tasks = spec.world_size // spec.launcher.nodes
    script = f"""#!/bin/bash
#SBATCH --nodes={spec.launcher.nodes} --ntasks-per-node={tasks} --output=/dev/null --exclude={spec.slurm.exclude or ""}
{clock}
srun --mpi=none {shlex.quote(sys.executable)} -c 'import trimaran.launchers.worker.run'
{clock}
"""
    submit(script)
    _wait(f"the job that writes {times}", lambda: times.exists() and len(times.read_text().split()) == 2)
    first, last = map(float, times.read_text().split())
    return last - first


def _wait(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: still waiting after {LONGEST_S:.0f} s")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
