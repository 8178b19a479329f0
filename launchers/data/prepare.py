"""Preparing the data of a run spec: the recipe on workers of the spec's launcher, then tokenizer and token shards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.terminal import say
from trimaran.models.fields import counted, printable
from trimaran.runtime.folder_lock import FolderLock
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from trimaran.runtime.data.engine.cluster import Cluster, Workers
    from trimaran.runtime.data.engine.task import Progress as OnProgress
    from trimaran.runtime.data.prepare import PreparedData
    from trimaran.runtime.data.recipe.curated import Curated
    from trimaran.runtime.data.tokens.build import Digests

_SHOWN_CHARACTERS = 200
_FOUND_WITHIN_S = 0.2
"""Of the start of a stage: what ends so soon was found on disk, and says nothing of the speed."""


def prepare_spec(
    spec: RunSpec, workers: "Workers | None", tokenizer: Path | None = None, former: "Digests | None" = None
) -> "tuple[Curated | None, PreparedData]":
    """Run the recipe of a spec, if it has one, train the tokenizer and write the token shards.

    Args:
        workers: of a spec with a recipe.

    Raises:
        Stopped: by Ctrl-C.
    """
    from trimaran.runtime.data.account import table_of
    from trimaran.runtime.data.prepare import prepare_data
    from trimaran.runtime.data.recipe.curate import curate
    from trimaran.runtime.data.recipe.of_spec import recipe_of

    if workers is None:
        curated, prepared = None, prepare_data(spec, tokenizer, former=former, environment=os.environ)
    else:
        with _working(spec, workers) as (cluster, progress):
            curated = curate(recipe_of(spec, os.environ), cluster, progress)
            prepared = prepare_data(
                spec,
                tokenizer,
                curated=curated,
                runner=cluster,
                progress=progress,
                former=former,
                environment=os.environ,
            )
    say(table_of(prepared.manifest))
    return curated, prepared


def curate_spec(spec: RunSpec, workers: "Workers", last_stage: str) -> "Curated":
    """Run the recipe of a spec on workers, up to one of its stages.

    Raises:
        Stopped: by Ctrl-C.
    """
    from trimaran.runtime.data.recipe.curate import curate
    from trimaran.runtime.data.recipe.of_spec import recipe_of

    with _working(spec, workers) as (cluster, progress):
        return curate(recipe_of(spec, os.environ), cluster, progress, last_stage)


@contextmanager
def _working(spec: RunSpec, workers: "Workers") -> Iterator[tuple["Cluster", "OnProgress"]]:
    """Yield what runs the tasks of a spec, and what shows how far they are, from the first that was not done before."""
    from trimaran.runtime.data.engine.cluster import Cluster

    root, shown, last = _root_of(spec), list["OnProgress"](), list[tuple[str, int, int, int]]()

    @contextmanager
    def at_work() -> Iterator[None]:
        with FolderLock.beside(root, "trimaran prepare", os.environ, waits=True), _progress() as update:
            shown.append(update)
            for told in last:
                update(*told)
            yield

    def progress(*told: Any) -> None:
        last[:] = [told]
        for update in shown:
            update(*told)

    try:
        with Cluster(root, workers, at_work) as cluster:
            yield cluster, progress
    except KeyboardInterrupt:
        raise Stopped(SIGINT, saved="what is done is kept, and the same command goes on there") from None


def find_prepared(spec: RunSpec) -> "PreparedData | None":
    """Return what the recipe of a spec has given where it was prepared before; does no work."""
    from trimaran.runtime.data.engine.task import OnDisk
    from trimaran.runtime.data.files import NotPrepared
    from trimaran.runtime.data.prepare import prepare_data
    from trimaran.runtime.data.recipe.curate import curate
    from trimaran.runtime.data.recipe.of_spec import recipe_of

    recipe = recipe_of(spec, os.environ, fetch=False)
    try:
        curated = curate(recipe, OnDisk(_root_of(spec)), lambda *_: None)
        return prepare_data(spec, curated=curated, build_missing=False, environment=os.environ)
    except NotPrepared:
        return None


def _root_of(spec: RunSpec) -> Path:
    return Path(spec.data.cache_dir, "recipes").absolute()


def export_prepared(prepared: "PreparedData", curated: "Curated | None", format: str, folder: Path) -> None:
    """Write the kept documents, or for megatron the tokens of both splits, into a folder.

    Raises:
        ValueError: the spec has no recipe whose documents could be written.
    """
    from trimaran.runtime.data.engine.parts import read_kept
    from trimaran.runtime.data.export import documents_of_shards, export_documents, export_megatron

    if format == "megatron":
        for shards in (prepared.train, prepared.held_out):
            if shards.num_tokens:
                tokens = documents_of_shards(shards, prepared.tokenizer.eot_id)
                files = export_megatron(tokens, folder / shards.split, prepared.tokenizer.vocab_size)
                say(f"{counted(files[0].documents, 'document')} of tokens: {files[0].path}")
        return
    if curated is None:
        raise ValueError(
            f"--export {format} writes the documents that a recipe keeps, and the spec has none: it needs data.clean, "
            "data.filter, data.dedup or data.corpora"
        )
    documents = (document for part in curated.parts for document in read_kept(part))
    for file in export_documents(documents, folder, format):
        say(f"{counted(file.documents, 'document')}: {file.path}")


@contextmanager
def _progress() -> Iterator["OnProgress"]:
    """Show a bar for each stage, with MB/s and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description:>14}"), BarColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        shown, found = dict[str, TaskID](), dict[str, int]()

        def update(stage: str, done: int, total: int, size: int) -> None:
            if stage not in shown:
                shown[stage], found[stage] = bars.add_task(stage, total=total, rate=""), 0
            elapsed = next(task.elapsed for task in bars.tasks if task.id == shown[stage]) or 0.0
            if elapsed < _FOUND_WITHIN_S:
                found[stage] = size
            worked = size - found[stage]
            rate = f"{worked / elapsed / 1e6:.1f} MB/s" if worked else ""
            bars.update(shown[stage], completed=done, total=total, rate=rate)

        yield update


def sample_rows(spec: RunSpec, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield of some documents of every corpus the id, and what is kept of the text or, removed, why and the text."""
    from trimaran.runtime.data.recipe.of_spec import recipe_of
    from trimaran.runtime.data.recipe.sample import sample_documents

    recipe = recipe_of(spec, os.environ, identify=False)
    for name, text, why in sample_documents(recipe, count, spec.data.task_timeout_s):
        kept, removed = ("", f"[{printable(why)}]\n{_short(text)}") if why else (_short(text), "")
        yield printable(name), kept, removed


def _short(text: str) -> str:
    return printable(text[:_SHOWN_CHARACTERS].expandtabs(4).replace("\xa0", " "), "\n")
