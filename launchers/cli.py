"""The command line: `trimaran train | check | schema | generate | report`. Nothing here imports torch before the spec is valid."""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from trimaran.launchers.local import LaunchError, LocalRun, Stopped, launch
from trimaran.runtime.spec import RunSpec, describe, dump_spec, json_schema, load_spec, parse_spec

if TYPE_CHECKING:
    from trimaran.runtime.data.prepare import PreparedData

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The run spec, a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as parallel.tp=2; may be repeated.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one checkpoint folder of it.")]
_PICTURE_MICROBATCHES = 64  # a drawing of more has boxes too thin to read


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """End the program with one sentence and a code for what a user can cause; anything else is a bug and shows its traceback."""
    try:
        yield
    except Stopped as stopped:
        _say(str(stopped), style="yellow")
        raise typer.Exit(128 + stopped.signal_number) from None
    except KeyboardInterrupt:
        _say("stopped by SIGINT before any rank was started", style="yellow")
        raise typer.Exit(128 + signal.SIGINT) from None
    except LaunchError as error:
        _complain(error)
        raise typer.Exit(error.exit_code if 0 < error.exit_code < 256 else 1) from None
    except (ValueError, OSError, _checkpoint_error()) as error:
        _complain(error)
        raise typer.Exit(2) from None


def _checkpoint_error() -> type[Exception]:
    """CheckpointError, where its room (and torch) has been imported; a class that nothing raises where it hasn't."""
    module = sys.modules.get("trimaran.runtime.checkpoint.manifest")
    return getattr(module, "CheckpointError", LaunchError)


def _say(text: str, style: str | None = None) -> None:
    # Never wrapped: a path that is broken in two can't be copied.
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def _complain(error: Exception) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(_sentence(error), markup=False, soft_wrap=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@app.command()
def train(spec_path: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006 - typer reads the default, nothing changes it
    """Validate, prepare the data, start the ranks, train, and write the report; resumes where the run's last checkpoint stands."""
    with _errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
        folder = Path(spec.train.output_dir)
        task = _prepare_run(spec, folder)
        _say(f"starting {spec.world_size} ranks ({dict(describe(spec))['layout']}); run folder {folder}")
        try:
            launch(LocalRun(spec, task, folder / "logs"))
        except Stopped as stopped:
            raise Stopped(stopped.signal_number, stopped.problem, _what_is_saved(folder)) from stopped
        finally:
            _try_to_report(folder)
        _say(f"report: {folder / 'report.html'}   more text: trimaran generate {folder} --prompt 'To be'")


def _prepare_run(spec: RunSpec, folder: Path) -> Path:
    """Check that the run may start or resume, prepare the data, fill the run folder, and return the ranks' task file."""
    from trimaran.runtime.data.prepare import prepare_data
    from trimaran.runtime.train.hardware import describe_machine

    _check_writable(folder)
    if (folder / "checkpoints").is_dir():
        from trimaran.runtime.train.state import resume_path

        resume_path(spec)  # before the data, which may take long
    data = prepare_data(spec)
    _check_run(spec, data)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(describe_machine()), encoding="utf-8")
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    (folder / "data_manifest.json").write_text(json.dumps(data.manifest, indent=1), encoding="utf-8")
    shutil.copyfile(data.folder / "tokenizer.json", folder / "tokenizer.json")
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
        _say(f"the report could not be written: {_sentence(error)}", style="yellow")


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
    with _errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        table = Table(show_header=False, box=None)
        for name, value in describe(spec):
            table.add_row(f"[bold]{name}[/]", value)
        Console().print(table)
        if picture is not None:
            _draw_schedule(spec, picture)
            _say(f"schedule drawn in {picture}")


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
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The ",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens only; 0 for all.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to run at.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree to run at.")] = 1,
) -> None:
    """Continue a prompt, straight from a training checkpoint, at any layout."""
    with _errors_as_sentences():
        from trimaran.launchers.worker import GenerateTask, run_task
        from trimaran.runtime.checkpoint.reshard import Checkpoint
        from trimaran.runtime.train.state import spec_of

        checkpoint = _find_checkpoint(run)
        stored = spec_of(Checkpoint.open(checkpoint, verify=False))
        with tempfile.TemporaryDirectory(prefix="trimaran-generate-") as scratch:
            folder = Path(scratch)
            (folder / "spec.yaml").write_text(dump_spec(_at_layout(stored, tp, pp)), encoding="utf-8")
            task = GenerateTask(
                spec=folder / "spec.yaml",
                checkpoint=checkpoint.resolve(),
                tokenizer=(checkpoint.parent.parent / "tokenizer.json").resolve(),
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            )
            if tp * pp == 1:
                run_task(task)
                return
            (folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
            launch(LocalRun(load_spec(task.spec), folder / "task.json", folder / "logs"))


def _find_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder, or the checkpoint folder itself."""
    from trimaran.runtime.checkpoint.folder import latest, step_of

    if step_of(run) is not None:
        return run
    found = latest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} has no whole checkpoint; give the folder of a run that `trimaran train` has made")
    return found


def _at_layout(spec: RunSpec, tp: int, pp: int) -> RunSpec:
    """The spec with a plain tp x pp layout."""
    raw = spec.model_dump(mode="json")
    raw["parallel"] = {"tp": tp, "pp": pp, "shared_memory": spec.parallel.shared_memory}
    raw["launcher"]["threads_per_rank"] = None
    return parse_spec(raw)


@app.command()
def report(run: RunPath) -> None:
    """Write RUN/report.html anew from the run's files."""
    with _errors_as_sentences():
        _write_report(run)
        _say(f"report: {run / 'report.html'}")


def main() -> None:
    """Entry point of the `trimaran` command."""
    app()


if __name__ == "__main__":
    main()
