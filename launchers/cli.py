"""The command line: `trimaran train | check | schema | generate | report`. Nothing here imports torch before the spec is valid."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.console import RunPath, errors_as_sentences, say, sentence
from trimaran.launchers.convert import export, import_
from trimaran.launchers.coordinates import coordinate_check
from trimaran.launchers.generation import generate
from trimaran.launchers.local import LocalRun, Stopped, launch
from trimaran.launchers.models import models
from trimaran.runtime.spec import RunSpec, describe, dump_spec, json_schema, load_spec

if TYPE_CHECKING:
    from trimaran.runtime.data.prepare import PreparedData

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(generate)
app.command()(models)
app.command()(coordinate_check)
app.command("import")(import_)
app.command()(export)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The run spec, a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as parallel.tp=2; may be repeated.")
]
_PICTURE_MICROBATCHES = 64  # a drawing of more has boxes too thin to read


@app.command()
def train(spec_path: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006 - typer reads the default, nothing changes it
    """Validate, prepare the data, start the ranks, train, and write the report; resumes where the run's last checkpoint stands."""
    with errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        _log_to_terminal()
        folder = Path(spec.train.output_dir)
        task = _prepare_run(spec, folder)
        say(f"starting {spec.world_size} ranks ({dict(describe(spec))['layout']}); run folder {folder}")
        try:
            launch(LocalRun(spec, task, folder / "logs"))
        except Stopped as stopped:
            raise Stopped(stopped.signal_number, stopped.problem, _what_is_saved(folder)) from stopped
        finally:
            _try_to_report(folder)
        more = f"   more text: trimaran generate {folder} --prompt 'To be'" if spec.transformer.is_causal else ""
        say(f"report: {folder / 'report.html'}{more}")


def _log_to_terminal() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])


def _prepare_run(spec: RunSpec, folder: Path) -> Path:
    """Check that the run may start or resume, prepare the data, fill the run folder, and return the ranks' task file."""
    from trimaran.runtime.data.prepare import prepare_data
    from trimaran.runtime.train.hardware import describe_machine

    _check_writable(folder)
    resumed = None
    if (folder / "checkpoints").is_dir():
        from trimaran.runtime.train.state import resume_path

        resumed = resume_path(spec)  # before the data, which may take long
    starts_from = resumed is None and spec.checkpoint.init_from is not None
    if starts_from:
        from trimaran.runtime.train.initial import check_initial_weights, has_their_tokenizer, take_companions

        check_initial_weights(spec)
    data = prepare_data(spec)
    _check_run(spec, data)
    takes_companions = bool(starts_from) and has_their_tokenizer(spec, data)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(describe_machine()), encoding="utf-8")
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    (folder / "data_manifest.json").write_text(json.dumps(data.manifest, indent=1), encoding="utf-8")
    shutil.copyfile(data.folder / "tokenizer.json", folder / "tokenizer.json")
    if takes_companions:
        take_companions(spec, folder)
    task = folder / "logs" / "task.json"
    content = {"kind": "train", "spec": str((folder / "spec.yaml").resolve()), "data": str(data.folder.resolve())}
    task.write_text(json.dumps(content), encoding="utf-8")
    return task


def _check_writable(folder: Path) -> None:
    """Refuse a run folder that can't be made or written, before the time that the data takes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"train.output_dir {folder} can't be made, because {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"train.output_dir {folder} can't be written: no permission to write in {existing}; choose another folder")


def _check_run(spec: RunSpec, data: "PreparedData") -> None:
    """Refuse what the ranks would refuse, while nothing is started yet."""
    from trimaran.runtime.train.loop import check_data
    from trimaran.runtime.train.state import check_same_data, read_state, resume_path

    check_data(spec, data)
    path = resume_path(spec)
    if path is not None:
        check_same_data(read_state(path), data)


def _what_is_saved(folder: Path) -> str:
    """Return the sentence that ends an interrupted run."""
    from trimaran.runtime.checkpoint.folder import latest, step_of

    path = latest(folder / "checkpoints")
    if path is None:
        return "nothing is saved yet, and the same command starts anew"
    return f"step {step_of(path)} is saved in {path}, and the same command resumes there"


def _try_to_report(folder: Path) -> None:
    """Write the report; a disk that is full must not hide how the run ended."""
    try:
        _write_report(folder)
    except OSError as error:
        say(f"the report could not be written: {sentence(error)}", style="yellow")


def _write_report(folder: Path) -> None:
    from trimaran.launchers.report import write_report

    write_report(folder)


@app.command()
def check(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    picture: Annotated[Path | None, typer.Option(help="Draw the pipeline schedule into this .svg or .png file.")] = None,
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
    schedule = add_communication(build_schedule(parallel.schedule, parallel.pp, spec.num_microbatches, parallel.virtual_stages))
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
        _write_report(run)
        say(f"report: {run / 'report.html'}")


def main() -> None:
    """Entry point of the `trimaran` command."""
    app()


if __name__ == "__main__":
    main()
