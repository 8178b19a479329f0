"""The batch script of a run: a pure function from its spec to the text for sbatch.

The script is what a person would write: options, modules, a check of the nodes, the ranks, and what to do at the time
limit. Everything of the spec is quoted for the shell, except `slurm.prolog`, which is shell code.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimaran.launchers.env.exit_codes import EXIT_FILE, NODES_REFUSED, SILENT_EXIT_CODE, STOPPED_BY_USR1
from trimaran.runtime.spec import RunSpec

_JOB_NAME_LENGTH = 64
_STRAGGLERS_S = 10


class ScriptError(ValueError):
    """The run can't be expressed as a batch script; the message says why."""


@dataclass(frozen=True)
class Job:
    """The input of a batch script.

    Args:
        spec: the run.
        arguments: of `python -m trimaran.launchers.worker`: the spec file and its overrides; one list for each
            run of an array.
        folder: the run folder, absolute.
        directory: where the ranks run, absolute; the spec's relative paths start there.
        python: the interpreter of the environment, on every node.
        program: what a task of the job runs, as words after `python -m`; none: the ranks of the run.
    """

    spec: RunSpec
    arguments: Sequence[Sequence[str]]
    folder: Path
    directory: Path
    python: str
    program: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The job's name: that of the run folder, without characters that Slurm's tools don't show."""
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", self.folder.name)[:_JOB_NAME_LENGTH].strip("_") or "trimaran"


def render(job: Job) -> str:
    """Return the script.

    Raises:
        ScriptError: a path has characters that an #SBATCH line can't hold.
    """
    blocks = [
        "#!/bin/bash\n" + "\n".join(f"#SBATCH {option}" for option in _options(job)),
        _settings(job),
        *([_environment(job)] if job.spec.slurm.modules or job.spec.slurm.prolog else []),
        _step(job),
        *([_preflight(job)] if job.spec.slurm.preflight_min_free_gib is not None else []),
        _ranks(job),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _options(job: Job) -> list[str]:
    section, spec = job.spec.slurm, job.spec
    per_node = spec.world_size // spec.launcher.nodes if section.tasks == "rank" else 1
    log = "slurm-%A_%a.log" if len(job.arguments) > 1 else "slurm-%j.log"
    plain = {
        **section.place,
        "mem": section.memory,
        "cpus-per-task": section.cpus_per_task,
        "gres": f"gpu:{section.gpus_per_node}" if section.gpus_per_node else None,
    }
    lead = section.signal_lead_s
    return [
        f"--job-name={job.name}",
        f"--nodes={spec.launcher.nodes}",
        f"--ntasks-per-node={per_node}",
        *(f"--{name}={value}" for name, value in plain.items() if value is not None),
        f"--chdir={_path(job.directory)}",
        f"--output={_path(job.folder / 'logs', percent=True)}/{log}",
        "--open-mode=append",
        # By default Slurm gives the ranks the limits of the login shell (ulimit), which are often low.
        *([] if any(option.startswith("--propagate") for option in section.options) else ["--propagate=NONE"]),
        *([f"--array=0-{len(job.arguments) - 1}"] if len(job.arguments) > 1 else []),
        "--requeue" if section.requeue else "--no-requeue",
        # Slurm signals the ranks, not the shell: they save, and their exit code shows it.
        *([f"--signal=USR1@{lead}"] if lead else []),
        *(_quoted_option(option) for option in section.options),
    ]


def _path(path: Path, *, percent: bool = False) -> str:
    """A path as the value of an #SBATCH line; with `percent`, one in which sbatch replaces %j."""
    text = str(path)
    if re.search(r"[\"'\\\n\r#$`]", text):
        raise ScriptError(
            f"the path {text!r} has characters that an #SBATCH line can't hold; use one without quotes, backslashes, "
            "# and $"
        )
    text = text.replace("%", "%%") if percent else text
    return text if re.fullmatch(r"[\w./+:@%=,-]+", text) else f'"{text}"'


def _quoted_option(option: str) -> str:
    name, equals, value = option.partition("=")
    return option if not equals or re.fullmatch(r"[^\s\"'\\#]+", value) else f"{name}={_double_quoted(value)}"


def _double_quoted(value: str) -> str:
    if re.search(r"[\"\\]", value):
        raise ScriptError(
            f"the value {value!r} of slurm.options has characters that an #SBATCH line can't hold; write it without \" "
            "and \\"
        )
    return f'"{value}"'


def _settings(job: Job) -> str:
    if len(job.arguments) == 1:
        words = "\n".join(f"  {shlex.quote(word)}" for word in job.arguments[0])
        arguments = f"run=(\n{words}\n)"
    else:
        cases = "\n".join(f"  {index}) run=({shlex.join(words)}) ;;" for index, words in enumerate(job.arguments))
        arguments = f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac'
    return f"""
python={shlex.quote(job.python)}
{arguments}

# scancel, preemption and the time limit send SIGTERM to the ranks, which save and leave, and to this shell, which waits
# for them.
trap '' TERM
export PYTHONUNBUFFERED=1
"""


def _environment(job: Job) -> str:
    modules = [f"module load {shlex.quote(module)}" for module in job.spec.slurm.modules]
    return "\n".join([*modules, *job.spec.slurm.prolog])


def _step(job: Job) -> str:
    return f"""
# Runs a step. Its exit code is the one that rank 0 writes into a file: srun's own may be that of a task that srun ended
# itself.
export {EXIT_FILE}={shlex.quote(str(job.folder / "logs"))}"/exit-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
step() {{
  srun --mpi=none "$@"
  code=$?
  [ -r "${EXIT_FILE}" ] && read -r code <"${EXIT_FILE}" && rm -f "${EXIT_FILE}"
}}
"""


def _preflight(job: Job) -> str:
    # A task that hangs on its node must not delay the others, which have finished without it.
    flags = f'--ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=0 --wait={_STRAGGLERS_S}'
    return f"""
# One task a node checks it and the links between the nodes. Nodes that should not be used are left out when the job
# starts again.
step {flags} "$python" -m trimaran.launchers.slurm.preflight "${{run[@]}}"
if [ "$code" -eq {NODES_REFUSED} ]; then
  "$python" -m trimaran.launchers.slurm.requeue "${{run[@]}}" && exit 0
fi
[ "$code" -eq 0 ] || exit "$code"
"""


def _ranks(job: Job) -> str:
    section = job.spec.slurm
    what = "trimaran.launchers.worker --launcher slurm" if section.tasks == "rank" else "trimaran.launchers.slurm.agent"
    command = f'"$python" -m {what} "${{run[@]}}"'
    if job.program:
        command = f'"$python" -m {shlex.join(job.program)}'
    flags = "--kill-on-bad-exit=1"
    if section.cpus_per_task is not None:
        flags += f" --cpus-per-task={section.cpus_per_task}"  # a step does not inherit it from the job
    if section.container is not None and section.container.endswith(".sif"):
        gpus = " --nv" if section.gpus_per_node else ""
        command = f"apptainer exec{gpus} {shlex.quote(section.container)} {command}"
    elif section.container is not None:
        mounts = shlex.quote(f"{job.directory}:{job.directory}")
        flags += f" --container-image={shlex.quote(section.container)} --container-mounts={mounts}"
    requeue = f"""
# The ranks have saved before the time limit: put the job back into the queue, to resume from there.
if [ "$code" -eq {STOPPED_BY_USR1} ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
# A rank died without a message. If its node is lost, the run resumes from its last checkpoint on another node.
if [ "$code" -eq {SILENT_EXIT_CODE} ]; then
  "$python" -m trimaran.launchers.slurm.requeue --lost "${{run[@]}}" && exit 0
fi
"""
    return f"""
# If one task fails, all end, and the job's exit code is that of the failed rank.
step {flags} {command}
{requeue if section.requeue else ""}
exit "$code"
"""
