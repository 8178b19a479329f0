"""`trimaran check` and `trimaran schema`: what a spec means and what a spec may hold. No torch."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.console import Launcher, Overrides, SpecPath, errors_as_sentences
from trimaran.launchers.cli.problems import problems_here
from trimaran.launchers.terminal import print_table, say, writing_output
from trimaran.models.fields import printable
from trimaran.runtime.spec import RunSpec, describe, json_schema, load_spec

_PICTURE_MICROBATCHES = 64  # a drawing of more has boxes too thin to read


def check(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    picture: Annotated[
        Path | None, typer.Option(help="Draw the pipeline schedule into this .svg or .png file.")
    ] = None,
    launcher: Launcher = None,
) -> None:
    """Validate a spec, print the resolved run (layout, parameters, tokens, schedule), and tell what would keep it from
    running on this machine: files, the length of the text, device, launcher. Starts nothing."""
    with errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        from rich.table import Table

        table = Table(show_header=False, box=None)
        table.add_column(style="bold")
        for name, value in describe(spec):
            table.add_row(name, printable(value))
        print_table(table)
        if picture is not None:
            _draw_schedule(spec, picture)
            say(f"schedule drawn in {picture}")
        found = problems_here(spec, launcher or spec.launcher.kind)
        if found:
            raise ValueError("\n  ".join(["this run can't start on this machine:", *found]))


def _draw_schedule(spec: RunSpec, path: Path) -> None:
    """Draw the simulated timeline, with costs in proportion to each stage's FLOPs."""
    from trimaran.runtime.pipeline.draw import save_png, timeline_svg
    from trimaran.runtime.pipeline.partition import stage_costs, stage_layers
    from trimaran.runtime.pipeline.passes import add_communication
    from trimaran.runtime.pipeline.schedule import build_schedule
    from trimaran.runtime.pipeline.simulate import Costs, simulate

    if spec.num_microbatches > _PICTURE_MICROBATCHES:
        raise ValueError(
            f"the schedule has {spec.num_microbatches} microbatches, too many to draw; --set train.global_batch_size "
            f"so that there are at most {_PICTURE_MICROBATCHES}"
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


def schema() -> None:
    """Print the JSON schema of a spec file, for editors."""
    with errors_as_sentences(), writing_output():
        print(json.dumps(json_schema(), indent=2))
