"""`trimaran check` and `trimaran schema`: what a spec means and what a spec may hold.

No torch; and a spec's model, which takes half of the time of `check --help`, only where there is a spec.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trimaran.launchers.cli.common.console import Launcher, Overrides, SpecOrRun, errors_as_sentences, path
from trimaran.launchers.terminal import print_table, say, writing_output
from trimaran.runtime.files import write_text

if TYPE_CHECKING:
    from trimaran.runtime.data.tokens.shards import TokenShards
    from trimaran.runtime.spec import RunSpec

_CANNOT_START: Final = "this run can't start on this machine:"
_PICTURE_MICROBATCHES = 64  # a drawing of more has boxes too thin to read


def check(
    spec_path: SpecOrRun,
    overrides: Overrides = [],  # noqa: B006
    picture: Annotated[
        Path | None, typer.Option(parser=path, help="Draw the pipeline schedule into this .svg or .png file.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Count what ranks hold in a training step, on whatever machine.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="With --memory, count this rank alone, action by action.")
    ] = None,
    examples: Annotated[
        int,
        typer.Option(min=0, help="Examples of a spec that finetunes, shown token by token, the learned ones coloured."),
    ] = 1,
    launcher: Launcher = None,
    chip: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Plan for this chip, or by trimaran calibrate's file."),
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of a rank's hour, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON; docs/check.md names them.")] = False,
) -> None:
    """Understand a run before it starts: its size, tokens a parameter, what runs where, the plan of memory, time and
    cost; and what would keep it from running on this machine. Starts nothing."""
    with errors_as_sentences():
        if rank is not None and not memory:
            raise ValueError("--rank chooses a rank for --memory; add --memory, or leave it out")
        if as_json and (memory or picture is not None):
            raise ValueError("--json prints the facts alone; leave it out, or --memory and --picture")
        if price_per_hour is not None:
            from trimaran.launchers.cli.planning.plan import check_rates

            check_rates({"--price-per-hour": price_per_hour})
        spec = _load(spec_path, overrides, as_json)
        from trimaran.launchers.cli.planning.overview import overview_of, table_of

        kind, corpora = launcher or spec.launcher.kind, _prepared_corpora(spec)
        overview = overview_of(spec, kind, chip, price_per_hour, _rows_of(spec, corpora))
        if as_json:
            _print_json(spec, kind, overview.facts, corpora)
            return
        print_table(table_of(overview))
        if overview.warning is not None:
            say(overview.warning, style="yellow")
        if picture is not None:
            draw_schedule(spec, picture)
            say(f"schedule drawn in {picture}")
        if memory:
            from trimaran.launchers.cli.planning.memory import print_memory

            print_memory(spec, rank)
            return
        if spec.finetune is not None:
            from trimaran.launchers.data.examples import print_examples

            print_examples(spec, examples)
        found = _problems(spec, kind, corpora)
        if found:
            raise ValueError("\n  ".join([_CANNOT_START, *found]))


def _load(spec_path: Path, overrides: list[str], as_json: bool) -> "RunSpec":
    """Return the spec; of a wrong one print the problems as JSON, where that is asked for, before the error."""
    from trimaran.launchers.cli.planning.overview import VERSION
    from trimaran.launchers.run_folder import spec_of
    from trimaran.runtime.spec import SpecError, load_spec

    try:
        return load_spec(*spec_of(spec_path, overrides))
    except SpecError as error:
        if as_json:
            problems = [str(each) for each in error.errors]
            with writing_output():
                print(json.dumps({"version": VERSION, "problems": problems}, indent=1))
        raise


def _problems(spec: "RunSpec", kind: str, corpora: "Mapping[str, TokenShards] | None") -> list[str]:
    from trimaran.launchers.problems import problems_here

    return problems_here(spec, kind) + ([] if corpora is None else _too_often(spec, corpora))


def _print_json(
    spec: "RunSpec", kind: str, facts: Mapping[str, Any], corpora: "Mapping[str, TokenShards] | None"
) -> None:
    found = _problems(spec, kind, corpora)
    with writing_output():
        print(json.dumps({**facts, "problems": found}, indent=1, allow_nan=False))
    if found:
        raise typer.Exit(2)


def _prepared_corpora(spec: "RunSpec") -> "dict[str, TokenShards] | None":
    """Return the tokens of each corpus for training where they are prepared; does no work."""
    if not spec.data.corpora or (spec.checkpoint.init_from is not None and spec.data.tokenizer is None):
        return None
    from trimaran.launchers.data.prepare import find_prepared
    from trimaran.runtime.data.samples.epochs import corpora_of

    try:
        prepared = find_prepared(spec)
        return None if prepared is None else corpora_of(spec, prepared.train)
    except (ValueError, OSError):
        return None  # told among the problems


def _rows_of(spec: "RunSpec", corpora: "Mapping[str, TokenShards] | None") -> list[tuple[str, str]]:
    if corpora is None:
        later = "their tokens and epochs are told here once trimaran prepare has run"
        return [("corpora", later)] if spec.data.corpora else []
    from trimaran.runtime.data.samples.epochs import epochs_of, samples_of

    drawn, epochs = samples_of(spec), epochs_of(spec, corpora)
    total = sum(drawn.values())
    return [
        (
            f"corpus {name}",
            f"{shards.num_tokens:,} tokens, {drawn[name] / total:.1%} of the samples, {epochs[name]:.3g} epochs",
        )
        for name, shards in corpora.items()
    ]


def _too_often(spec: "RunSpec", corpora: "Mapping[str, TokenShards]") -> list[str]:
    from trimaran.runtime.data.samples.epochs import check_epochs

    try:
        check_epochs(spec, corpora)
    except ValueError as error:
        return [str(error)]
    return []


def check_drawable(spec: "RunSpec") -> None:
    """Raise ValueError where the schedule has too many microbatches to draw."""
    if spec.num_microbatches > _PICTURE_MICROBATCHES:
        raise ValueError(
            f"the schedule has {spec.num_microbatches} microbatches, too many to draw; --set train.global_batch_size "
            f"so that there are at most {_PICTURE_MICROBATCHES}"
        )


def draw_schedule(spec: "RunSpec", path: Path) -> None:
    """Draw the simulated timeline, with costs in proportion to each stage's FLOPs."""
    from trimaran.runtime.pipeline.draw import save_png, timeline_svg
    from trimaran.runtime.pipeline.simulate import simulate
    from trimaran.runtime.train.pipeline import costs_of, schedule_of

    check_drawable(spec)
    parallel = spec.parallel
    spans = simulate(schedule_of(spec), costs_of(spec)).spans
    name = parallel.schedule_file or parallel.schedule
    title = f"{name}, {parallel.pp} pipeline ranks, {spec.num_microbatches} microbatches"
    if path.suffix == ".png":
        save_png(spans, path, title)
    elif path.suffix == ".svg":
        write_text(path, timeline_svg(spans, title))
    else:
        raise ValueError(f"--picture must end in .svg or .png; got {path}")


def schema() -> None:
    """Print the JSON schema of a spec file, for editors."""
    from trimaran.runtime.spec import json_schema

    with errors_as_sentences(), writing_output():
        print(json.dumps(json_schema(), indent=2))
