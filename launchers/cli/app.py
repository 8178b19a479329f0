"""The command line. Nothing here imports torch before the spec is valid."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from trimaran.launchers.cli.console import RunPath, errors_as_sentences, say
from trimaran.launchers.cli.convert import export, import_
from trimaran.launchers.cli.generate import generate
from trimaran.launchers.cli.jobs import cancel, logs, status
from trimaran.launchers.cli.mup_check import coordinate_check
from trimaran.launchers.cli.presets import models
from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.env.rank_env import is_rank
from trimaran.launchers.local.launch import LocalRun, launch
from trimaran.launchers.local.node_agent import run_node_by_hand
from trimaran.launchers.local.torch_elastic import get_ready
from trimaran.launchers.prepare_run import prepare_run, try_to_report, what_is_saved, write_report_of
from trimaran.launchers.slurm.submit import train_by_mpi, train_on_slurm
from trimaran.launchers.worker.entry import be_rank
from trimaran.runtime.spec import RunSpec, describe, json_schema, load_spec

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(generate)
app.command()(models)
app.command()(coordinate_check)
app.command()(status)
app.command()(logs)
app.command()(cancel)
app.command("import")(import_)
app.command()(export)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The run spec, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as parallel.tp=2; may be repeated."),
]
_PICTURE_MICROBATCHES = 64  # a drawing of more has boxes too thin to read


@app.command()
def train(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    launcher: Annotated[
        Literal["local", "slurm", "mpi"] | None, typer.Option(help="In place of the spec's launcher.kind.")
    ] = None,
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
) -> None:
    """Validate, prepare the data, start the ranks, train, and write the report; resumes where the run's last checkpoint stands."""
    with errors_as_sentences():
        if is_rank(os.environ):  # under mpirun, srun or torchrun, this process is one rank of the run
            be_rank(spec_path, overrides)
        spec = load_spec(spec_path, overrides)
        kind = launcher or spec.launcher.kind
        if kind != "slurm" and (dry_run or following or array):
            raise ValueError("--dry-run, --follow and --array are for --launcher slurm")
        if kind == "slurm":
            train_on_slurm(spec_path, overrides, array, dry_run=dry_run, following=following)
        elif kind == "mpi":
            train_by_mpi(spec, spec_path, overrides)
        elif spec.launcher.nodes > 1:
            _log_to_terminal()
            raise typer.Exit(run_node_by_hand(spec, spec_path, overrides))
        else:
            _train_here(spec)


def _train_here(spec: RunSpec) -> None:
    """Prepare the run and start its ranks on this machine."""
    _log_to_terminal()
    folder = Path(spec.train.output_dir)
    get_ready(spec, spec.world_size)
    task = prepare_run(spec, folder)
    say(f"starting {spec.world_size} ranks ({dict(describe(spec))['layout']}); run folder {folder}")
    try:
        launch(LocalRun(spec, task, folder / "logs"))
    except Stopped as stopped:
        raise Stopped(stopped.signal_number, stopped.problem, what_is_saved(folder)) from stopped
    finally:
        try_to_report(folder)
    more = f"   more text: trimaran generate {folder} --prompt 'To be'" if spec.transformer.is_causal else ""
    say(f"report: {folder / 'report.html'}{more}")


def _log_to_terminal() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )


@app.command()
def check(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    picture: Annotated[
        Path | None, typer.Option(help="Draw the pipeline schedule into this .svg or .png file.")
    ] = None,
) -> None:
    """Validate a spec and print the resolved run: layout, parameters, tokens, schedule. Starts nothing."""
    with errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name, value in describe(spec):
            table.add_row(f"[bold]{name}[/]", value)
        Console().print(table)
        if picture is not None:
            _draw_schedule(spec, picture)
            say(f"schedule drawn in {picture}")


def _draw_schedule(spec: RunSpec, path: Path) -> None:
    """Draw the simulated timeline, with costs in proportion to each stage's FLOPs."""
    from trimaran.runtime.pipeline.draw import save_png, timeline_svg
    from trimaran.runtime.pipeline.partition import stage_costs, stage_layers
    from trimaran.runtime.pipeline.passes import add_communication
    from trimaran.runtime.pipeline.schedule import build_schedule
    from trimaran.runtime.pipeline.simulate import Costs, simulate

    if spec.num_microbatches > _PICTURE_MICROBATCHES:
        raise ValueError(
            f"the schedule has {spec.num_microbatches} microbatches, too many to draw; --set train.global_batch_size so that there are "
            f"at most {_PICTURE_MICROBATCHES}"
        )
    parallel = spec.parallel
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, parallel.layers_per_stage)
    flops = stage_costs(spec.transformer, spec.train.seq_len, layers)
    forward = [cost / max(flops) for cost in flops]
    schedule = add_communication(
        build_schedule(parallel.schedule, parallel.pp, spec.num_microbatches, parallel.virtual_stages)
    )
    spans = simulate(schedule, Costs(forward=forward, backward=[2 * cost for cost in forward])).spans
    title = f"{parallel.schedule}, {parallel.pp} pipeline ranks, {spec.num_microbatches} microbatches"
    if path.suffix == ".png":
        save_png(spans, path, title)
    elif path.suffix == ".svg":
        path.write_text(timeline_svg(spans, title), encoding="utf-8")
    else:
        raise ValueError(f"--picture must end in .svg or .png; got {path}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec file, for editors."""
    print(json.dumps(json_schema(), indent=2))


@app.command()
def report(run: RunPath) -> None:
    """Write RUN/report.html anew from the run's files."""
    with errors_as_sentences():
        write_report_of(run)
        say(f"report: {run / 'report.html'}")


def main() -> None:
    """Entry point of the `trimaran` command."""
    app()


if __name__ == "__main__":
    main()
