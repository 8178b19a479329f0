"""`trimaran train`: prepare a run and start its ranks, or run as one of them under another launcher."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.before_start import check_code, check_device, check_nodes, check_sinks
from trimaran.launchers.chip_option import chip_at
from trimaran.launchers.cli.common.console import Launcher, Overrides, SpecOrRun, errors_as_sentences
from trimaran.launchers.cli.common.suggested_prompt import in_quotes, suggested_prompt
from trimaran.launchers.env.network import check_network
from trimaran.launchers.env.rank_env import is_rank
from trimaran.launchers.local.launch import train_here
from trimaran.launchers.local.mpirun import run_by_mpirun
from trimaran.launchers.local.node_agent import run_node_by_hand
from trimaran.launchers.run_folder import spec_of
from trimaran.launchers.slurm.submit import train_on_slurm
from trimaran.launchers.terminal import log_to_terminal, say, silenced
from trimaran.launchers.worker.entry import serve_as_rank
from trimaran.launchers.worker.tasks import SpecFile
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.chips import Chip


def train(
    spec_path: SpecOrRun,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    launcher: Launcher = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="slurm: print the batch script and do nothing.")] = False,
    following: Annotated[
        bool, typer.Option("--follow", help="slurm: show the job until it ends; Ctrl-C leaves it alone.")
    ] = False,
    array: Annotated[
        list[str],
        typer.Option(
            metavar="FIELD=VALUE,VALUE", help="slurm: one job array, a run for each combination; may be repeated."
        ),
    ] = [],  # noqa: B006
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let finetune.rl.rewards run the Python files that it names.")
    ] = False,
    chip: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="local: plan, and MFU, for this chip, or by trimaran calibrate's file."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors alone, and at the end where the report is.")
    ] = False,
) -> None:
    """Validate, prepare the data, start the ranks, train, and write the report; resumes where the run's last checkpoint
    stands, also by the run's folder in place of its spec."""
    with ExitStack() as kept, errors_as_sentences():
        spec_path, overrides = spec_of(spec_path, overrides)
        # Under mpirun, srun or torchrun, this process is one rank of the run.
        if launcher != "local" and is_rank(os.environ):
            serve_as_rank(SpecFile(spec_path, overrides, allow_code))
        spec = load_spec(spec_path, overrides)
        check_code(spec, allow_code=allow_code)
        check_sinks(spec)
        kind = launcher or spec.launcher.kind
        known = None if chip is None else _chip_of(spec, chip, kind)
        if kind != "slurm" and (dry_run or following or array):
            raise ValueError("--dry-run, --follow and --array are for --launcher slurm")
        if quiet and (kind == "slurm" or spec.launcher.nodes > 1):
            raise ValueError("--quiet is for a run on this machine alone; leave it out")
        if kind == "slurm":
            raise typer.Exit(train_on_slurm(spec_path, overrides, array, dry_run=dry_run, following=following))
        check_nodes(spec, kind)
        check_network(spec.launcher.interface)
        check_device(spec, spec.world_size // spec.launcher.nodes)
        if kind == "mpi":
            with silenced(quiet):
                code = run_by_mpirun(spec, spec_path, overrides)
            _say_report(spec, is_on=quiet and code == 0)
            raise typer.Exit(code)
        log_to_terminal()
        if spec.launcher.nodes > 1:
            raise typer.Exit(run_node_by_hand(spec, spec_path, overrides))
        with silenced(quiet):
            # Kept until the sentence about an error is said: the log has it too.
            train_here(spec, known, command=f"trimaran train {spec_path}", kept=kept)
            _say_what_next(spec)
        _say_report(spec, is_on=quiet)


def _say_report(spec: RunSpec, *, is_on: bool) -> None:
    if is_on:
        say(f"report: {Path(spec.train.output_dir) / 'report.html'}")


def _chip_of(spec: RunSpec, name: str, kind: str) -> "Chip | Machine":
    """Return what `--chip` names. Raises ValueError where it can't be what the run is planned for."""
    if kind != "local" or spec.launcher.nodes > 1:
        raise ValueError("--chip is for a run on this machine alone; trimaran plan SPEC --chip plans others")
    known, machine = chip_at(name)
    if machine is None:
        assert known is not None
        return known
    from trimaran.runtime.plan.on_machine import check_kind

    check_kind(spec, machine)
    return machine


def _say_what_next(spec: RunSpec) -> None:
    """Say where the report is, and the command that uses the model."""
    folder = Path(spec.train.output_dir)
    more = ""
    if not spec.transformer.has_head:
        more = f"   scores: trimaran score {shlex.quote(str(folder))} FILE"
    elif spec.transformer.is_causal:
        prompt, quoted = suggested_prompt(folder), shlex.quote(str(folder))
        ask = f"chat {quoted}" if prompt is None else f"generate {quoted} --prompt {in_quotes(prompt)}"
        more = f"   more text: trimaran {ask}"
    say(f"report: {folder / 'report.html'}{more}")
