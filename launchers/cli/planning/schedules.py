"""`trimaran schedules`: what every pipeline schedule that fits a spec would cost, as a table, a list or a drawing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import Overrides, SpecPath, errors_as_sentences, path
from trimaran.launchers.terminal import print_table, say, writing_output
from trimaran.runtime.spec import RunSpec, SpecError, load_spec

if TYPE_CHECKING:
    from trimaran.runtime.pipeline.simulate import Simulation

_COLUMNS = ("schedule", "stages a rank", "makespan", "of which idle", "idle between a rank's actions", "held at most")


def schedules(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    csv: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print this schedule, one line a rank, as torch writes it.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=path, help="Draw each of them into a .svg file in this folder.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(parser=path, help="Write all of them into this .json file, for Perfetto.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN", help="--trace: with this run's measured timeline first.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Count the bytes that the pipeline ranks hold at most, too (takes longer).")
    ] = False,
) -> None:
    """Compare the pipeline schedules that fit a spec's layers, ranks and microbatches, by simulation. Starts nothing.

    The unit of time is the forward of a microbatch through a rank's equal share of the layers; what a rank holds at
    most is in microbatches through all of its layers.
    """
    with errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        from trimaran.launchers.cli.planning.check import check_drawable, draw_schedule
        from trimaran.launchers.cli.planning.memory import bytes_at_most
        from trimaran.launchers.cli.planning.timeline import write_trace
        from trimaran.runtime.pipeline.csv_text import write_csv
        from trimaran.runtime.pipeline.simulate import simulate
        from trimaran.runtime.train.pipeline import costs_of, schedule_of

        fitting, given = specs_that_fit(spec), spec.parallel.layers_per_stage
        if csv is not None:
            if csv not in fitting:
                raise ValueError(f"--csv {csv}: the schedules that fit this spec are {', '.join(fitting)}")
            if given is not None and fitting[csv].parallel.layers_per_stage is None:
                stages = f"the {fitting[csv].num_stages} stages of {csv} have layers balanced by cost"
                say(f"parallel.layers_per_stage is for {len(given)} stages; {stages}")
            with writing_output():
                print(write_csv(schedule_of(fitting[csv])), end="")
        if picture is not None:
            check_drawable(spec)
            picture.mkdir(parents=True, exist_ok=True)
            for name, each in fitting.items():
                draw_schedule(each, picture / f"{Path(name).name}.svg")
        if trace is not None:
            write_trace(trace, fitting, run)
        elif run is not None:
            raise ValueError("--run is for --trace FILE.json, into which its timeline goes")
        if csv is not None:
            return
        from rich.table import Table

        # Layers that are given for other stages than a schedule's say nothing about it.
        more = [*(["bytes at most"] if memory else []), *([f"layers (given for {len(given)} stages)"] if given else [])]
        table = Table(*_COLUMNS, *more, box=None)
        for name, each in fitting.items():
            virtual_stages = each.parallel.virtual_stages
            cells = _cells(simulate(schedule_of(each), costs_of(each)), virtual_stages)
            held = [bytes_at_most(each)] if memory else []
            layers = "as given" if each.parallel.layers_per_stage else "balanced by cost"
            table.add_row(name, str(virtual_stages), *cells, *held, *([layers] if given else []))
        print_table(table)


def specs_that_fit(spec: RunSpec) -> dict[str, RunSpec]:
    """Return, by schedule, the spec with that schedule and the virtual stages that it needs, where it is valid."""
    from trimaran.runtime.pipeline.schedules import SCHEDULES
    from trimaran.runtime.spec import parse_spec

    found: dict[str, RunSpec] = {}
    for name, row in SCHEDULES.items():
        virtual_stages = row.virtual_stages or max(2, spec.parallel.virtual_stages)
        content = spec.model_dump(mode="json")
        content["parallel"] |= {"schedule": name, "virtual_stages": virtual_stages, "schedule_file": None}
        if virtual_stages != spec.parallel.virtual_stages:
            content["parallel"]["layers_per_stage"] = None
        try:
            found[name] = parse_spec(content)
        except SpecError:
            continue
    if spec.parallel.schedule_file is not None:
        found[spec.parallel.schedule_file] = spec
    return found


def _cells(simulation: "Simulation", virtual_stages: int) -> tuple[str, ...]:
    held = sorted({f"{peak / virtual_stages:g}" for peak in simulation.peak_held}, key=float)
    return (
        f"{simulation.makespan:.1f}",
        f"{simulation.bubble:.1%}",
        f"{max(simulation.idle):.1f}",
        held[0] if len(held) == 1 else f"{held[0]} to {held[-1]}",
    )
