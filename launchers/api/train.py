"""`train`, `check` and `plan`: a spec from Python. Imports no torch before the spec is known to be right."""

from os import PathLike
from typing import Any

from trimaran.launchers.api.calls import expect, ranks_of_a_call
from trimaran.launchers.api.run import Run
from trimaran.launchers.before_start import check_code, check_device, check_nodes, check_sinks
from trimaran.launchers.env.network import check_network
from trimaran.runtime.spec import RunSpec, load_spec


def train(spec: RunSpec | str | PathLike[str], *, allow_code: bool = False) -> Run:
    """Train the run of a spec on this machine as `trimaran train` does, and return the run.

    It prepares the data, starts a process for each rank, trains, and writes the report. Where the run folder has a
    checkpoint, it resumes there; a run that is finished comes back as it is. Ranks are processes of their own: nothing
    of the model stays in this one. They import nothing of the calling script, which needs no guard of its main part.

    Args:
        spec: a spec, or the path of its file.
        allow_code: whether the files of Python that finetune.rl.rewards names may run.

    Raises:
        SpecError: the spec is wrong; holds all errors.
        ValueError, OSError: the run can't start on this machine, or its data is wrong.
        FolderInUse: another process trains in the run folder.
        LaunchError: a rank failed; the text starts with the rank that is the cause.
        KeyboardInterrupt: Ctrl-C, or a notebook's interrupt, once the ranks have saved and ended.
        Stopped: SIGTERM or SIGUSR1, in the same way.
    """
    from trimaran.launchers.local.launch import train_here

    known = _loaded(spec)
    check_code(known, allow_code=allow_code)
    check_sinks(known)
    if known.launcher.kind != "local" or known.launcher.nodes > 1:
        raise ValueError(
            f"train starts ranks on this machine alone, and the spec has launcher.kind {known.launcher.kind} and "
            f"launcher.nodes {known.launcher.nodes}: set them to local and 1, or start `trimaran train SPEC`"
        )
    with ranks_of_a_call("train"):
        check_nodes(known, "local")
        check_network(known.launcher.interface)
        check_device(known, known.world_size)
        return Run(train_here(known, command="trimaran.train"))


def check(spec: RunSpec | str | PathLike[str]) -> list[str]:
    """Return a sentence for everything on this machine that would keep a run from its first step, as `trimaran check`.

    Starts nothing. An empty list means that nothing is known to be in the way.

    Args:
        spec: a spec, or the path of its file.

    Raises:
        SpecError: the spec is wrong; holds all errors.
    """
    from trimaran.launchers.problems import problems_here

    known = _loaded(spec)
    return problems_here(known, known.launcher.kind)


def plan(spec: RunSpec | str | PathLike[str], chip: str | PathLike[str] | None = None) -> dict[str, Any]:
    """Return what a run will take, before it starts: memory of every pipeline rank, seconds of a step, a checkpoint.

    It is what `trimaran train` writes as plan.json. What is not known is None, and `why_not` says why.

    Args:
        spec: a spec, or the path of its file.
        chip: an accelerator by its name, such as "H100-SXM", or a file of `trimaran calibrate`; None for this machine,
            as far as it is known.

    Raises:
        SpecError: the spec is wrong; holds all errors.
        ValueError, OSError: there is no such chip, or the file is no calibration of it.
    """
    from trimaran.launchers.chip_option import chip_at
    from trimaran.launchers.data.run_plan import place_of
    from trimaran.runtime.plan.brief import brief_of

    run = _loaded(spec)
    known, machine = (None, None) if chip is None else chip_at(str(chip))
    if machine is not None:
        from trimaran.runtime.plan.on_machine import check_kind

        check_kind(run, machine)
    return brief_of(run, place_of(run, known or machine)).model_dump(mode="json")


def _loaded(spec: RunSpec | str | PathLike[str]) -> RunSpec:
    expect("spec", spec, (RunSpec, str, PathLike), "a spec (load_spec, parse_spec), or the path of its file")
    return spec if isinstance(spec, RunSpec) else load_spec(spec)
