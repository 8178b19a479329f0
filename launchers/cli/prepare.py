"""`trimaran prepare` and `trimaran data`: from sources to token shards, and what became of a document."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.cli.common.console import Launcher, Overrides, SpecPath, errors_as_sentences, path
from trimaran.launchers.terminal import log_to_terminal, new_table, print_table, say
from trimaran.models.fields import printable
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from rich.table import Table

    from trimaran.runtime.data.engine.cluster import Workers

_EXPORT = Path("export")
data = typer.Typer(no_args_is_help=True, add_completion=False, help="What a recipe has kept and removed.")
DataFolder = Annotated[
    Path, typer.Argument(parser=path, metavar="FOLDER", help="A run folder, or the folder that prepare has named.")
]


def prepare(
    spec_path: SpecPath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    launcher: Launcher = None,
    workers: Annotated[int | None, typer.Option(min=1, help="In place of the spec's data.workers.")] = None,
    only: Annotated[
        Literal["clean", "filter", "dedup", "decontaminate"] | None,
        typer.Option(help="Stop after this stage of the recipe."),
    ] = None,
    export: Annotated[
        Literal["megatron", "jsonl.zst", "parquet"] | None,
        typer.Option(help="Write the tokens (megatron) or the kept documents too, into --export-to."),
    ] = None,
    export_to: Annotated[
        Path | None, typer.Option(parser=path, metavar="FOLDER", help="Folder of --export; ./export without it.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Show so many documents, what cleaning and filters keep and remove; write nothing."),
    ] = None,
) -> None:
    """Read, clean, filter and deduplicate the text, train the tokenizer and write the token shards; goes on where an
    earlier call stopped."""
    with errors_as_sentences():
        spec = load_spec(spec_path, overrides)
        log_to_terminal()
        from trimaran.launchers.data.prepare import curate_spec, export_prepared, prepare_spec, sample_rows
        from trimaran.launchers.data.prepare_run import write_data_page_of

        if (only or sample) and not spec.data.has_recipe:
            raise ValueError(
                "--only and --sample are for a recipe, which this spec has not: it needs data.corpora, clean, filter, "
                "dedup or decontaminate"
            )
        if export is not None:
            check_writable("--export-to", export_to or _EXPORT)
        if sample is not None:
            table = new_table("document", "kept", "removed, and why", show_lines=True)
            for row in sample_rows(spec, sample):
                table.add_row(*row)
            print_table(table)
            return
        if spec.finetune is not None:
            from trimaran.launchers.data.examples import prepare_examples_of

            if export is not None:
                raise ValueError("--export writes text, and a spec with a section finetune has examples; leave it out")
            say(f"examples: {prepare_examples_of(spec, resumed=False).folder}")
            return
        crew = _workers_of(spec, launcher or spec.launcher.kind, workers) if spec.data.has_recipe else None
        if only is not None and crew is not None:
            write_data_page_of(curate_spec(spec, crew, only))
            return
        curated, prepared = prepare_spec(spec, crew)
        if curated is not None:
            write_data_page_of(curated, prepared)
        say(f"token shards: {prepared.folder}")
        if export is not None:
            export_prepared(prepared, curated, export, export_to or _EXPORT)


def _workers_of(spec: RunSpec, kind: str, count: int | None) -> "Workers":
    from trimaran.launchers.data.workers import WorkerOptions, local_workers, mpi_workers, slurm_workers
    from trimaran.launchers.env.network import check_network, reachable_address

    options = WorkerOptions.of_spec(spec, count)
    if kind == "local":
        check_network(spec.launcher.interface)
        return local_workers(options)
    host = reachable_address(os.environ, interface=spec.launcher.interface, one_node=False)
    if kind == "mpi":
        return mpi_workers(options, host)
    return slurm_workers(options, host, spec, in_job="SLURM_JOB_ID" in os.environ)


@data.command()
def show(folder: DataFolder) -> None:
    """Print what every stage of a recipe has kept and removed, by reason."""
    with errors_as_sentences():
        _, manifest = _open(folder)
        print_table(_table_of(manifest))


@data.command()
def why(
    folder: DataFolder,
    document: Annotated[str, typer.Argument(metavar="ID", help="A document, as CORPUS/FILE#PLACE.")],
) -> None:
    """Print the fate of one document: kept, or which stage removed it and why."""
    with errors_as_sentences():
        from trimaran.runtime.data.recipe.fate import fate_of

        root, manifest = _open(folder)
        fate = fate_of(root, manifest, document)
        if fate is None:
            raise ValueError(f"{folder} has no document {document!r}; ids are CORPUS/FILE#PLACE, as prepare shows them")
        if fate.removed is None:
            typer.echo(f"{printable(document)} is kept")
        else:
            # The name of a file may be part of the reason, as of a classifier.
            why, detail = printable(fate.removed.reason), printable(fate.removed.detail)
            typer.echo(f"{printable(document)} is removed by {fate.removed.stage}: {why}{detail and f' ({detail})'}")
        typer.echo(printable(fate.text, "\n"))


def _open(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the root of the tasks' folders and the manifest of a recipe.

    Raises:
        ValueError: the folder has none.
    """
    from trimaran.runtime.data.recipe.curated import folder_of_recipe, open_curated

    curated = open_curated(folder_of_recipe(folder))
    return curated.root, dict(curated.manifest)


def _table_of(manifest: dict[str, Any]) -> "Table":
    table = new_table("stage", "documents", "bytes", "why")
    for stage in manifest["stages"]:
        came, size = stage["documents"].get("in", 0), stage["text_bytes"]
        table.add_row(stage["name"], f"{came:,} in", f"{size.get('in', 0):,}", "")
        for reason, count in sorted(stage["reasons"].items(), key=lambda item: -item[1]):
            table.add_row("", f"-{count:,}", "", f"{printable(reason)} ({count / max(1, came):.2%})")
        table.add_row("", f"{stage['documents'].get('out', 0):,} kept", f"{size.get('out', 0):,}", "")
        for name, count in sorted(item for item in stage["counts"].items() if ":" not in item[0]):
            table.add_row("", "", "", f"{printable(name)}: {count:,}")
    return table
