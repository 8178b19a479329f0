"""The order of the stages that remove copies, and which tasks each consists of."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.dedup.near import BAND_NAMES
from trimaran.runtime.data.dedup.substring import plan_groups
from trimaran.runtime.data.engine.parts import count_kept
from trimaran.runtime.data.engine.task import Output, damaged_files
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.recipe.curated import folder_of_recipe, open_curated
from trimaran.runtime.data.recipe.stage_runner import StageRunner

_TASKS: Final = "trimaran.runtime.data.recipe.dedup"
_WORDS: Final = 5
_GROUP_MEMORY: Final = 2 << 30
"""Of a group of parts whose substrings are compared, where data.worker_memory does not say."""
_OTHER_MEMORY: Final = 384 << 20
"""Of a worker, beside what it compares."""
_LEAST_MEMORY: Final = 64 << 20
_CUT_LATER: Final = ("lines", "substring", "decontaminate")
"""Stages after which a document is no longer what was compared."""


def deduplicate(runner: StageRunner, section: Mapping[str, Any], parts: list[Output]) -> list[Output]:
    """Run the stages of `data.dedup`, as JSON; return what is kept of every part."""
    words = section["near"]["words"] if section["near"] else _WORDS
    earlier = [each for folder in section["against"] for each in _index_of(runner, Path(folder), words)]
    if section["url"] or section["exact"]:
        parts = _copies(runner, section, parts, earlier, words)
    if section["near"]:
        parts = _near(runner, section["near"], parts, earlier)
    if section["lines"]:
        parts = _lines(runner, section["lines"], parts)
    if section["substring"]:
        parts = _substrings(runner, section["substring"], parts)
    return parts


def _copies(
    runner: StageRunner, section: Mapping[str, Any], parts: list[Output], earlier: Sequence[Output], words: int
) -> list[Output]:
    keys, names = (
        runner.each("copies-keys", f"{_TASKS}:copy_keys", {}, parts),
        _names(runner, "copies", parts, earlier, words),
    )
    settings = {"url": section["url"], "exact": section["exact"], "parts": len(parts), "words": words}
    found = runner.one("copies-compare", f"{_TASKS}:compare_copies", settings, [*parts, *keys, names, *earlier])
    reasons = [f"{name}.copy" for name in ("url", "exact") if section[name]]
    return _removed(runner, "copies", reasons, parts, found, names)


def _names(
    runner: StageRunner, stage: str, parts: list[Output], earlier: Sequence[Output] = (), words: int = _WORDS
) -> Output:
    """Return the ids of all documents, those of earlier runs first."""
    return runner.one(
        f"{stage}-names", f"{_TASKS}:name_documents", {"parts": len(parts), "words": words}, [*parts, *earlier]
    )


def _near(
    runner: StageRunner, section: Mapping[str, Any], parts: list[Output], earlier: Sequence[Output]
) -> list[Output]:
    words, count, names = section["words"], len(parts), _names(runner, "near", parts, earlier, section["words"])
    keys = runner.each("near-keys", f"{_TASKS}:near_keys", {"words": words, "bands": len(BAND_NAMES)}, parts)
    bands = runner.several(
        "near-buckets",
        f"{_TASKS}:near_buckets",
        [{"band": band, "parts": count, "words": words} for band in BAND_NAMES],
        [[*keys, *earlier]] * len(BAND_NAMES),
    )
    first_new = sum(output.result["documents"] for output in earlier)
    starts = list(accumulate([count_kept(part.folder) for part in parts], initial=first_new))
    sharing = runner.one("near-sharing", f"{_TASKS}:near_sharing", {"starts": starts}, bands)
    shingles = runner.several(
        "near-shingles",
        f"{_TASKS}:near_shingles",
        [{"part": number, "words": words} for number in range(count)],
        [[part, sharing] for part in parts],
    )
    settings = {"parts": count, "words": words, "threshold": section["threshold"]}
    found = runner.one("near-compare", f"{_TASKS}:compare_near", settings, [*parts, *shingles, *bands, names, *earlier])
    return _removed(runner, "near", ["near.copy"], parts, found, names)


def _removed(
    runner: StageRunner, stage: str, reasons: Sequence[str], parts: list[Output], found: Output, names: Output
) -> list[Output]:
    runner.clusters += found.result["clusters"]
    settings = [{"part": number, "stage": stage, "reasons": list(reasons)} for number in range(len(parts))]
    return runner.apply(stage, f"{_TASKS}:apply_removals", settings, parts, [[found, names]] * len(parts))


def _lines(runner: StageRunner, section: Mapping[str, Any], parts: list[Output]) -> list[Output]:
    least = {"min_characters": section["min_characters"]}
    keys = runner.each("lines-keys", f"{_TASKS}:line_keys", least, parts)
    found = runner.one("lines-compare", f"{_TASKS}:compare_lines", {}, keys)
    settings = [{"part": number, **least} for number in range(len(parts))]
    shared = [found, _names(runner, "lines", parts)]
    return runner.apply("lines", f"{_TASKS}:apply_lines", settings, parts, [shared] * len(parts))


def _substrings(runner: StageRunner, section: Mapping[str, Any], parts: list[Output]) -> list[Output]:
    """Compare the parts in groups that fit into the memory; copies in two groups are both kept."""
    sizes = [part.result["text_bytes"].get("out", 0) for part in parts]
    limit = runner.recipe.substring_memory
    memory = _GROUP_MEMORY if limit is None else max(_LEAST_MEMORY, limit - _OTHER_MEMORY)
    groups = plan_groups(sizes, memory)
    found = runner.several(
        "substring-find",
        f"{_TASKS}:find_substrings",
        [{"min_bytes": section["min_bytes"], "memory_bytes": memory}] * len(groups),
        [[parts[number] for number in group] for group in groups],
    )
    runner.notes["substring_groups"] = sum(output.result["chunks"] for output in found)
    starts, names = (
        list(accumulate([count_kept(part.folder) for part in parts], initial=0)),
        _names(runner, "substring", parts),
    )
    settings = [
        {"part_of_group": at, "first_of_group": starts[group[0]]} for group in groups for at in range(len(group))
    ]
    shared = [[output, names] for group, output in zip(groups, found, strict=True) for _ in group]
    return runner.apply("substring", f"{_TASKS}:apply_substrings", settings, parts, shared)


def _index_of(runner: StageRunner, folder: Path, words: int) -> list[Output]:
    """Return the index of an earlier run, made of what it kept before lines and substrings were cut.

    Raises:
        DataError: the folder is of no run with a recipe, or what is compared is gone or damaged.
    """
    earlier = open_curated(folder_of_recipe(folder))
    whole = [stage for stage in earlier.manifest["stages"] if stage["name"] not in _CUT_LATER]
    outputs = [Output.read(earlier.root / part) for part in whole[-1]["folders"]]
    kept = [output for output in outputs if output is not None]
    if len(kept) < len(outputs):
        raise DataError(f"dedup.against {folder}: its documents are gone; run trimaran prepare on its spec again")
    for path in damaged_files(kept, earlier.folder / "checked-documents.json"):
        raise DataError(f"dedup.against {folder}: {path} is not what it was; run trimaran prepare on its spec again")
    return runner.several(
        "index", f"{_TASKS}:write_index", [{"words": words}] * len(kept), [[output] for output in kept]
    )
