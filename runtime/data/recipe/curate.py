"""From the sources of a recipe to the documents that are kept: one stage after the other, each a list of tasks.

    sources -> clean -> filter -> deduplicate -> decontaminate -> kept documents

A stage whose settings and input are as before is found on disk. The manifest has every count, and what made it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trimaran.runtime.data.decontaminate import Hit
from trimaran.runtime.data.engine.task import Output, Progress, TaskRunner
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.recipe.curated import MANIFEST, Curated
from trimaran.runtime.data.recipe.deduplicate import deduplicate
from trimaran.runtime.data.recipe.recipe import Recipe
from trimaran.runtime.data.recipe.stage_runner import FORMAT, StageRunner
from trimaran.runtime.data.recipe.steps import evaluation_sets
from trimaran.runtime.files import write_text
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection

STAGES: Final = ("clean", "filter", "dedup", "decontaminate")
STEPS: Final = "trimaran.runtime.data.recipe.steps"


def curate(recipe: Recipe, cluster: TaskRunner, progress: Progress, last_stage: str | None = None) -> Curated:
    """Run the recipe's stages and write the manifest; return what is kept.

    Args:
        last_stage: one of STAGES, after which to stop; None for all.

    Raises:
        DataError: a task failed, or nothing is kept.
    """
    runner = StageRunner(recipe, cluster, progress)
    parts = runner.read()
    _check_losses(recipe, runner.stages[0])
    last = STAGES.index(last_stage) if last_stage is not None else len(STAGES)
    if recipe.filter is not None and last >= STAGES.index("filter"):
        parts = runner.section("filter", f"{STEPS}:filter_kept", parts)
    if recipe.dedup is not None and last >= STAGES.index("dedup"):
        parts = deduplicate(runner, recipe.dedup, parts)
    if recipe.decontaminate is not None and last >= STAGES.index("decontaminate"):
        parts = runner.section("decontaminate", f"{STEPS}:decontaminate_kept", parts)
        runner.found_items = _found_items(recipe.decontaminate, parts)
        for file in recipe.named_files.get("decontaminate", ()):  # the table is made of it
            file.check()
    manifest = _manifest(recipe, runner, parts)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    folder = cluster.root / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MANIFEST, text + "\n")
    if not runner.stages[-1]["documents"].get("out"):
        raise DataError(f"the recipe keeps no document; trimaran data show {folder} says what removed them")
    return Curated(folder, parts, manifest)


def _check_losses(recipe: Recipe, stage: Mapping[str, Any]) -> None:
    """Raise DataError where more than a share `max_lost_fraction` of the documents could not be read for one reason."""
    came = max(1, stage["documents"].get("in", 0))
    for reason, count in stage["reasons"].items():
        if reason.startswith("read.") and count > recipe.max_lost_fraction * came:
            raise DataError(
                f"{count:,} of {came:,} documents ({count / came:.1%}) are left out as {reason}, more than "
                f"data.max_lost_fraction ({recipe.max_lost_fraction:g}); trimaran prepare --sample shows some; mend "
                "the files, leave them out, or raise data.max_lost_fraction if this is meant"
            )


def _found_items(section: Mapping[str, Any], parts: Sequence[Output]) -> dict[str, Any]:
    """Return the table of evaluation items that were found, a row for each set."""
    hits = [Hit(**hit) for part in parts for hit in part.result["hits"]]
    table = evaluation_sets(DecontaminateSection.model_validate(section)).table(hits)
    return {name: {**row, "found": [hit._asdict() for hit in row["found"]]} for name, row in table.items()}


def _manifest(recipe: Recipe, runner: StageRunner, parts: Sequence[Output]) -> dict[str, Any]:
    files = {
        f"{source.part.corpus}/{source.part.name}": {"sha256": source.sha256, "bytes": source.part.file_bytes}
        for source in recipe.parts
    }
    named = {file.path: file.sha256 for files in recipe.named_files.values() for file in files}
    return {
        "format": FORMAT,
        "settings": {
            name: getattr(recipe, name) for name in ("clean", "filter", "dedup", "decontaminate", "max_document_bytes")
        },
        "named_files": named,
        "versions": runner.versions,
        "sources": files,
        "passed_over": recipe.passed_over,
        "stages": runner.stages,
        "notes": runner.notes,
        "evaluation_sets": runner.found_items,
        "clusters": sorted(runner.clusters, key=lambda cluster: (-cluster["copies"], cluster["kept"])),
        "parts": [
            {"folder": str(part.folder.relative_to(runner.root)), "sha256": part.digest, "corpus": corpus}
            for part, corpus in zip(parts, runner.corpora, strict=True)
        ],
    }
