"""`trimaran plan`: what a run will take, before it starts, with its error band; its errors on published runs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trimaran.launchers.chip_option import chip_at, is_file
from trimaran.launchers.cli.common.console import Overrides, errors_as_sentences, path
from trimaran.launchers.terminal import print_table, say
from trimaran.runtime.files import write_text
from trimaran.runtime.spec import load_spec

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.forecast import Plan, Setting
    from trimaran.runtime.spec import RunSpec

_TABLES = Path(__file__).parents[3] / "tests" / "plan" / "published"
_GBIT = 1e9 / 8
_MEASURED = "measured"  # group of constants of trimaran calibrate
DEFAULT_CHIP: Final = "H100-SXM"
_GPUS_PER_NODE, _NIC, _PUE, _FAILURE_HOURS, _RESTART, _WRITE_RATE = 8, 400.0, 1.1, 50_700.0, 300.0, 10.0


def plan(
    spec_path: Annotated[
        Path | None, typer.Argument(parser=path, metavar="[SPEC]", help="The run spec, a YAML file.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    chip: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Accelerator, by its datasheet; or a file of trimaran calibrate.")
    ] = DEFAULT_CHIP,
    software: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Whose calibration: a published software's, or a file of trimaran calibrate --fit; by default all.",
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that the fast links join.")] = _GPUS_PER_NODE,
    nic: Annotated[float, typer.Option(help="Gbit/s between nodes, a GPU and direction.")] = _NIC,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of a GPU-hour, in any currency.")] = None,
    watts: Annotated[
        float | None, typer.Option(help="Watts of a GPU with its share of the node; by default its own.")
    ] = None,
    pue: Annotated[float, typer.Option(help="Energy of the site over that of its computers.")] = _PUE,
    hours_per_failure: Annotated[float, typer.Option(help="GPU-hours between two failures.")] = _FAILURE_HOURS,
    restart: Annotated[float, typer.Option(help="Seconds from a failure to the next step.")] = _RESTART,
    write_rate: Annotated[float, typer.Option(help="GB/s at which all ranks write a checkpoint.")] = _WRITE_RATE,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, metavar="FILE", help="Write the plan into this file too.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Draw the plan, the search or --published into this .svg file.",
        ),
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Search for the fastest layouts that fit instead.")] = False,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="With --search: GPUs; by default those of the spec.")
    ] = None,
    fix: Annotated[
        list[str], typer.Option(metavar="FIELD=VALUE", help="With --search: keep a field, such as parallel.tp=8.")
    ] = [],  # noqa: B006
    headroom: Annotated[float, typer.Option(help="With --search: share of the chip's memory that stays free.")] = 0.05,
    write: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="With --search: write the spec of the fastest.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Print how far plans lie from the published runs, in place of a plan.")
    ] = False,
) -> None:
    """Tell what a run will take, before it starts: memory of every pipeline rank, step time, days, money, energy."""
    with errors_as_sentences():
        if picture is not None and picture.suffix != ".svg":
            raise ValueError(f"--picture must end in .svg; got {picture}")
        check_folders({"--json": json_file, "--picture": picture, "--write": write})
        if published:
            _print_published(picture, is_alone=spec_path is None and not search)
            return
        if spec_path is None:
            raise ValueError("a plan is made of a run spec; give one, or --published for the errors of plans")
        rates = {
            "--gpus-per-node": gpus_per_node, "--nic": nic, "--price-per-hour": price_per_hour, "--watts": watts,
            "--pue": pue, "--hours-per-failure": hours_per_failure, "--write-rate": write_rate,
        }  # fmt: skip
        _check(rates, restart, pue)
        spec = load_spec(spec_path, overrides)
        setting, machine = _setting(
            spec, chip, software, nic, gpus_per_node, price_per_hour, watts, pue, hours_per_failure, restart, write_rate
        )
        if machine is not None:
            _check_processors(chip, search=search, draws=picture is not None)
        if search:
            from trimaran.launchers.cli.planning.layouts import print_search

            print_search(spec, setting, gpus=gpus, headroom=headroom, fix=fix, write=write, picture=picture)
            return
        if gpus is not None or fix or write is not None:
            raise ValueError("--gpus, --fix and --write are for a search; add --search, or leave them out")
        _plan(spec, setting, json_file, picture, machine=machine)


def check_folders(files: Mapping[str, Path | None]) -> None:
    """Check that files can be written where options say, before any work.

    Raises:
        ValueError: the folder of one does not exist, or it is a folder itself; names the option.
    """
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{option} {file}: there is no folder {file.parent}; make it, or write elsewhere")
        if file is not None and file.is_dir():
            raise ValueError(f"{option} {file} is a folder; give the name of a file")


def check_rates(rates: Mapping[str, float | None]) -> None:
    """Raise ValueError where the value of an option, by its name, is not above 0 and finite."""
    for option, value in rates.items():
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{option} must be above 0 and finite; got {value}")


def _check(rates: Mapping[str, float | None], restart: float, pue: float) -> None:
    check_rates(rates)
    if not 0 <= restart < math.inf:
        raise ValueError(f"--restart must be at least 0 and finite; got {restart}")
    if pue < 1:
        raise ValueError(f"--pue must be at least 1, the energy of the computers themselves; got {pue}")


def _check_processors(chip: str, *, search: bool, draws: bool) -> None:
    """Raise ValueError where a calibration of a CPU is given for what the constants of GPUs alone can do."""
    for option, is_given, what in (("--search", search, "times layouts"), ("--picture", draws, "draws a step")):
        if is_given:
            raise ValueError(
                f"{option} {what} by the constants of GPUs, and --chip {chip} is of a CPU; give a GPU's, or leave "
                f"{option} out"
            )


def _setting(
    spec: "RunSpec",
    chip: str,
    software: str | None,
    nic: float,
    gpus_per_node: int,
    price: float | None,
    watts: float | None,
    pue: float,
    hours_per_failure: float,
    restart: float,
    write_rate: float,
) -> "tuple[Setting, Machine | None]":
    """Return what the plan is made for, and the machine whose processors `--chip` names a calibration of.

    Raises:
        ValueError, OSError: a name is not known, or a file is no calibration, or one of something else.
    """
    from trimaran.runtime.plan.forecast import Setting

    known, machine = chip_at(chip)
    named, measured = software, None
    if machine is not None:
        from trimaran.runtime.plan.on_machine import check_kind, chip_of

        check_kind(spec, machine)
        known = chip_of(machine, spec)
    assert known is not None, "one of them is there"
    if software is not None and is_file(software):
        from trimaran.runtime.plan.calibrate.software import calibration_in

        if machine is not None:
            raise ValueError(f"--chip {chip} and --software {software} both hold measured constants; give one of them")
        measured = calibration_in(path(software), known.name, spec.precision.dtype)
        named = measured.software
    elif machine is not None and machine.kind == "gpu":
        from trimaran.runtime.plan.on_machine import constants_of_gpu

        measured, machine = constants_of_gpu(spec, machine, software), None
    rest = (price, watts, pue, hours_per_failure, restart)
    return Setting(known, named, nic * _GBIT, gpus_per_node, *rest, write_rate * 1e9, measured), machine


def plan_by(spec: "RunSpec", chip: str, price: float | None) -> "tuple[Plan, Setting]":
    """Return the plan that `trimaran plan SPEC --chip CHIP --price-per-hour PRICE` makes, and what it is made for.

    Raises:
        ValueError, OSError: as `trimaran plan` says.
    """
    rest = (_NIC, _GPUS_PER_NODE, price, None, _PUE, _FAILURE_HOURS, _RESTART, _WRITE_RATE)
    setting, machine = _setting(spec, chip, None, *rest)
    return _made(spec, setting, machine), setting


def _made(spec: "RunSpec", setting: "Setting", machine: "Machine | None") -> "Plan":
    if machine is None:
        from trimaran.runtime.plan.forecast import plan as make_plan

        return make_plan(spec, setting)
    from trimaran.runtime.plan.on_machine import plan_on

    return plan_on(spec, machine, setting)


def _plan(
    spec: "RunSpec", setting: "Setting", json_file: Path | None, picture: Path | None, *, machine: "Machine | None"
) -> None:
    from trimaran.runtime.plan.forecast import timeline

    found = _made(spec, setting, machine)
    _print_plan(spec, setting, found)
    if json_file is not None:
        write_text(json_file, json.dumps(content_of(setting, found), indent=1) + "\n")
        say(f"plan written to {json_file}")
    if picture is not None:
        from trimaran.launchers.report.plan_charts import plan_picture

        write_text(picture, plan_picture(spec, setting, found, timeline(spec, setting)))
        say(f"plan drawn in {picture}")


def content_of(setting: "Setting", found: "Plan") -> dict[str, Any]:
    """Return a plan as JSON can hold it."""
    calibration = found.calibration
    return {
        "version": 1,
        "chip": setting.chip.name,
        "calibration": {"software": calibration.software, "chip": calibration.chip, "runs": calibration.runs},
        "error_p90": found.error,
        "memory_bytes": found.memory,
        "fullest_pipeline_rank": found.fullest,
        "chip_bytes": setting.chip.memory_bytes,
        "step_seconds": found.seconds,
        "step_parts": dict(found.parts),
        "bubble": found.bubble,
        "figures": {name: value if math.isfinite(value) else None for name, value in found.figures.items()},
    }


def _print_plan(spec: "RunSpec", setting: "Setting", found: "Plan") -> None:
    from rich.table import Table

    names = [name for name in found.memory[0] if any(rank[name] for rank in found.memory)]
    table = Table("pipeline rank", *names, "in all", f"of {_gib(setting.chip.memory_bytes)}", box=None)
    for number, rank in enumerate(found.memory):
        whole = found.total(number)
        cells = [_gib(rank[name]) for name in names]
        mark = " (fullest)" if number == found.fullest and spec.parallel.pp > 1 else ""
        table.add_row(f"{number}{mark}", *cells, _gib(whole), f"{whole / setting.chip.memory_bytes:.0%}")
    print_table(table)
    if not found.exact:
        say("what a layer of this kind keeps is estimated; trimaran check --memory counts it")
    _print_fit(spec, setting, found)
    if spec.finetune is not None:
        say(
            "this counts a step over text that trains every parameter: frozen weights of an adapter hold less, a "
            "reference and answers that are sampled more; trimaran check --memory counts them",
            style="yellow",
        )
    dtype, whose = spec.precision.dtype, found.calibration
    is_measured = whose.group == _MEASURED
    if dtype != "bfloat16" and not is_measured:
        say(f"the times are those of 16-bit products, which those of {dtype} take longer than", style="yellow")
    steps = Table("of a step", "seconds", "share", box=None)
    for name, value in sorted(found.parts.items(), key=lambda item: -item[1]):
        if abs(value) >= 5e-4 * found.seconds:
            steps.add_row(name, f"{value:.4g}", f"{value / found.seconds:.1%}")
    steps.add_row("in all", f"{found.seconds:.4g}", "")
    print_table(steps)
    band = (
        "outside what was calibrated"
        if found.error is None
        else f"± {found.error:.0%} in 9 of 10 of the {'steps' if is_measured else 'runs'} that it was fitted on"
    )
    source = "measured on this chip" if is_measured else f"{whose.runs} runs, GPUs {whose.gpus}"
    say(f"calibration: {whose.software} on {whose.chip}, {source}; error {band}")
    peak = f"{setting.chip.flops:.4g} FLOP/s a {'rank' if is_measured else 'GPU'}"
    say(f"MFU and HFU: matrix FLOPs, attention's square whole (PaLM, appendix B), over {peak}")
    totals = Table("of the run", "", box=None)
    for name, value in found.figures.items():
        totals.add_row(name, _figure(name, value))
    print_table(totals)


def _print_fit(spec: "RunSpec", setting: "Setting", found: "Plan") -> None:
    """Say by how much a plan doesn't fit, and the change of one choice that costs least time and makes it fit."""
    from trimaran.runtime.plan.search.neighbours import cheapest_change

    chip = setting.chip
    missing = found.total(found.fullest) - chip.memory_bytes
    if missing <= 0:
        return
    change = cheapest_change(spec, setting)
    would = "no change of one choice makes it fit: --search looks for layouts that do"
    if change is not None and change.plan is not None:
        would = f"it would with {change.change}, {change.plan.seconds / found.seconds:.2f} times the step"
    needs = f"it doesn't fit: pipeline rank {found.fullest} needs {_gib(missing)} more than {chip.name} has"
    say(f"{needs}; {would}", style="yellow")


def _print_published(picture: Path | None, *, is_alone: bool) -> None:
    """Print the errors of plans; ValueError where a plan is asked for too."""
    if not is_alone:
        raise ValueError("--published is of published runs alone; leave out the spec and --search, or --published")
    from rich.table import Table

    from trimaran.runtime.plan.published.accuracy import memory_rows, published_runs, time_rows
    from trimaran.runtime.plan.time.calibrations import shipped

    if not _TABLES.is_dir():
        raise ValueError(f"the published tables are in the repository, not in an installed package: no {_TABLES}")
    timed, measured = published_runs(_TABLES)
    table = Table("published rows", "number", "error", "bar", "", box=None)
    for row in [*time_rows(timed, shipped()), *memory_rows(measured)]:
        table.add_row(
            row.what, str(row.rows), row.figures, row.bar, ("held" if row.holds else "missed") if row.bar else ""
        )
    print_table(table)
    if picture is not None:
        from trimaran.launchers.report.plan_charts import published_picture
        from trimaran.runtime.plan.published.accuracy import pairs_of

        write_text(picture, published_picture(pairs_of(timed, measured, shipped())))
        say(f"predicted against measured drawn in {picture}")


def _figure(name: str, value: float) -> str:
    if name in ("MFU", "HFU") or name.startswith("goodput"):
        return f"{value:.1%}"
    if name == "checkpoint bytes":
        return _gib(value)
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
