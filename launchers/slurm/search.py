"""A search as batch jobs: one array of workers, each of which asks the study for the next trial until there is none.

A worker's job is that of a run on one node: it checks its node, goes back into the queue at the time limit and after
its node is lost, and leaves out nodes that should not be used.
"""

import shlex
import sys
from pathlib import Path

from trimaran.launchers.slurm.jobs import SUBMITTED_SPEC, Planned, submit_run
from trimaran.launchers.slurm.sbatch import Job, render
from trimaran.launchers.terminal import say, writing_output
from trimaran.models.fields import counted
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.study import Study

WORKERS = "workers"
"""Folder of the workers' folders in that of the study."""


def print_script(plan: Plan) -> None:
    """Print the batch script of a search."""
    with writing_output():
        print(render(_planned(plan).job), end="")


def submit_workers(plan: Plan, study: Study) -> None:
    """Submit the workers of a study that has begun.

    Raises:
        SlurmError: its workers have not ended, or sbatch refuses.
    """
    number = submit_run(_planned(plan))
    folder = shlex.quote(str(study.folder))
    say(f"job {number} submitted: {counted(plan.tune.parallel_trials, 'worker')} of the study in {study.folder}")
    say(f"see trimaran tune status {folder}; scancel {number} ends it, and the same command goes on")


def _planned(plan: Plan) -> Planned:
    folder = Path(plan.tune.output_dir).absolute()
    spec, runs = plan.first_spec(), []
    for number in range(plan.tune.parallel_trials):
        of_worker = folder / WORKERS / str(number)
        runs.append((of_worker, _spec_of_worker(spec, of_worker)))
    arguments = [[str(of_worker / SUBMITTED_SPEC)] for of_worker, _ in runs]
    program = ("trimaran.launchers.tune.worker", str(folder))
    return Planned(Job(runs[0][1], arguments, folder, Path.cwd(), sys.executable, program), runs)


def _spec_of_worker(spec: RunSpec, folder: Path) -> RunSpec:
    """Return the run of some trial as that of a job with one task, which has the CPUs of all its ranks."""
    fields = spec.model_dump(mode="json")
    cpus = spec.slurm.cpus_per_task
    if spec.slurm.tasks == "rank":
        cpus = (cpus or 1) * spec.world_size
    fields["slurm"] |= {"tasks": "node", "cpus_per_task": cpus}
    fields["train"]["output_dir"] = str(folder)
    fields["launcher"]["kind"] = "slurm"
    return parse_spec(fields)
