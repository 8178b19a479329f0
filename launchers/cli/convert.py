"""`trimaran import` and `trimaran export`: Hugging Face models in and out, each proven by its logits.

Imports no torch before a command runs.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimaran.launchers.cli.common.console import RunPath, errors_as_sentences, path
from trimaran.launchers.stoppable import stoppable
from trimaran.launchers.terminal import say
from trimaran.models.fields import printable
from trimaran.runtime.plan.brief import size

if TYPE_CHECKING:
    from trimaran.runtime.huggingface.importing import Imported
    from trimaran.runtime.huggingface.progress import Progress
    from trimaran.runtime.huggingface.proof import Agreement

_GIB = 2**30
_LEFT = "nothing is left of what was half written"
_MOST_BAR = 30  # characters of the progress bar

MemoryGib = Annotated[
    float,
    typer.Option(
        "--memory-gib",
        min=0.01,
        help="Weights that transformers may hold for the comparison; more of them stay on disk, which is slower.",
    ),
]


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            parser=path, metavar="DIR|FILE", help="A folder with config.json and safetensors, or a .gguf file."
        ),
    ],
    run: Annotated[
        Path | None, typer.Argument(parser=path, metavar="[RUN]", help="The run folder to make; runs/NAME by default.")
    ] = None,
    memory_gib: MemoryGib = 2.0,
    base: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="RUN", help="Of a PEFT adapter's folder: the run of the model it changes."),
    ] = None,
) -> None:
    """Make a run of a Hugging Face model, which any layout trains on from and generates with; proven by its logits."""
    with errors_as_sentences(), stoppable(lambda: _LEFT):
        target = run if run is not None else Path("runs") / _name_of(source)
        if base is not None:
            _import_adapter(source, target, base)
            return
        from trimaran.runtime.huggingface.importing import Limits, import_model

        with _progress() as progress:
            imported = import_model(source, target, Limits(memory_bytes=int(memory_gib * _GIB)), progress, os.environ)
        _say_agreements(imported.agreements)
        _say_what_next(imported)


def export(
    run: RunPath,
    folder: Annotated[
        Path | None,
        typer.Argument(parser=path, metavar="[DIR]", help="The folder to make; RUN/huggingface by default."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights in the files; that of the run's precision by default."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Family of the architecture, such as llama; the first that expresses the model by default."),
    ] = None,
    max_shard_gib: Annotated[float, typer.Option(min=0.001, help="Largest file; more than one get an index.")] = 2.0,
    memory_gib: MemoryGib = 2.0,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run of adapters: these alone, as a folder for PEFT.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run of adapters: the weights they make with their base (the default).")
    ] = False,
) -> None:
    """Write a folder that transformers and vLLM load, from a run's newest checkpoint; proven by its logits."""
    with errors_as_sentences(), stoppable(lambda: _LEFT):
        if adapter and merge:
            raise ValueError("--adapter writes the adapters alone and --merge whole weights; give one of them")
        if adapter:
            _export_adapter(run, folder, dtype, family)
            return
        from trimaran.runtime.huggingface.exporting import ExportOptions, export_model
        from trimaran.runtime.train.init_from import open_weights

        weights, run_folder = open_weights(run)
        if merge and not hasattr(weights, "adapters"):
            raise ValueError(f"{run} has no adapters to merge, for it trained all weights; leave --merge out")
        target = folder if folder is not None else run_folder / "huggingface"
        options = ExportOptions(dtype, family, int(max_shard_gib * _GIB), int(memory_gib * _GIB))
        with _progress() as progress:
            exported = export_model(run, target, options, progress, os.environ)
        _say_agreements(exported.agreements)
        say(f"{exported.architecture} in {exported.dtype}, {size(exported.num_bytes)} of weights: {exported.folder}")
        served = f", or vllm serve {shlex.quote(str(exported.folder))}" if exported.is_causal else ""
        say(f"load it: transformers.{exported.architecture}.from_pretrained({str(exported.folder)!r}){served}")


def _export_adapter(
    run: Path, folder: Path | None, dtype: Literal["float32", "bfloat16", "float16"] | None, family: str | None
) -> None:
    from trimaran.runtime.adapters.peft_export import export_adapter
    from trimaran.runtime.huggingface.exporting import ExportOptions
    from trimaran.runtime.train.init_from import open_weights

    target = folder if folder is not None else open_weights(run)[1] / "adapter"
    exported = export_adapter(run, target, ExportOptions(dtype, family), os.environ)
    say(f"adapters of rank {exported.rank} beside {exported.num_modules} layers of {exported.architecture}: {target}")
    made = (
        "" if Path(exported.base).is_dir() else f", which trimaran export {shlex.quote(_run_of(exported.base))} makes"
    )
    say(f"load it: peft.PeftModel.from_pretrained(model, {str(target)!r}), with the model of {exported.base}{made}")


def _run_of(base: str) -> str:
    """Return the run whose export is the folder `base`."""
    return base.removesuffix("/huggingface")


def _import_adapter(source: Path, target: Path, base: Path) -> None:
    from trimaran.runtime.adapters.peft_import import import_adapter

    imported = import_adapter(source, target, base, os.environ)
    for note in imported.notes:
        say(note)
    say(f"adapters of rank {imported.rank} beside {', '.join(imported.targets)} imported into {imported.run}")
    say(_text_of(imported.run))


def _text_of(run: Path) -> str:
    """Return the command that has the model write; it asks for the text to begin with, whose language isn't known."""
    return f"text: trimaran chat {shlex.quote(str(run))} --mode continue"


def _name_of(source: Path) -> str:
    name = source.resolve().name
    return name.removesuffix(".gguf")


@contextmanager
def _progress() -> "Iterator[Progress]":
    """Show the progress on one line of a terminal; without a terminal, print sentences only."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from trimaran.runtime.huggingface.progress import Progress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(_MOST_BAR),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    console = Console(file=sys.stderr, highlight=False)  # today's stderr, even if it is replaced meanwhile
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        line = bars.add_task("reading", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bars.update(line, description=f"{what} {_amount(done, total)}", completed=done, total=total)

        yield Progress(lambda text: console.print(printable(text), markup=False, emoji=False, soft_wrap=True), advance)


def _amount(done: int, total: int) -> str:
    if total < 10**6:
        return f"{done} of {total}"
    return f"{done / _GIB:.2f} of {total / _GIB:.2f} GiB"


def _say_agreements(agreements: "list[Agreement]") -> None:
    say("the logits of transformers and of this runtime agree:")
    for agreement in agreements:
        say(f"  {agreement}")


def _say_what_next(imported: "Imported") -> None:
    run, output = imported.run, imported.spec.train.output_dir
    scores = not imported.spec.transformer.has_head
    say(f"{imported.family} {'reward ' if scores else ''}model imported into {run}")
    quoted, spec = shlex.quote(str(run)), shlex.quote(str(run / "spec.yaml"))
    if imported.has_tokenizer and imported.spec.transformer.is_causal and not scores:
        say(_text_of(run))
    if scores:
        say(f"scores: trimaran score {quoted} FILE, and {quoted} among finetune.rl.rewards")
        return
    say(
        f"train on from it, at any layout, into {output}: "
        f'trimaran train {spec} --set "data.source=[my-texts]" --set parallel.pp=2'
    )
