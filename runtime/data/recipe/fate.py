"""What became of a document: kept, or removed where and why; and removed documents to look at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.data.engine.parts import Removed, read_kept, read_removed


@dataclass(frozen=True)
class Fate:
    """The fate of a document.

    Attributes:
        text: the kept text, or the beginning of the removed one.
        removed: None where it is kept.
    """

    id: str
    text: str
    removed: Removed | None


def stage_folders(root: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield (stage, folder) of every task that kept or removed documents, in order."""
    for stage in manifest["stages"]:
        for folder in stage["folders"]:
            yield stage["name"], root / folder


def fate_of(root: Path, manifest: Mapping[str, Any], document: str) -> Fate | None:
    """Return what became of the document of an id; None where the sources have none of it."""
    for _, folder in stage_folders(root, manifest):
        for removed in read_removed(folder):
            if removed.id == document:
                return Fate(document, removed.excerpt, removed)
    for part in manifest["parts"]:
        for kept in read_kept(root / part["folder"]):
            if kept.id == document:
                return Fate(document, kept.text, None)
    return None


def samples(root: Path, manifest: Mapping[str, Any], most: int) -> dict[str, Sequence[Removed]]:
    """Return up to `most` removed documents of every reason, spread evenly over the sources."""
    found: dict[str, list[Removed]] = {}
    seen: dict[str, int] = {}
    strides: dict[str, int] = {}
    totals = {reason: count for stage in manifest["stages"] for reason, count in stage["reasons"].items()}
    for _, folder in stage_folders(root, manifest):
        for removed in read_removed(folder):
            number = seen[removed.reason] = seen.get(removed.reason, -1) + 1
            stride = strides.setdefault(removed.reason, max(1, totals[removed.reason] // most))
            mine = found.setdefault(removed.reason, [])
            if number % stride == 0 and len(mine) < most:
                mine.append(removed)
    return dict(sorted(found.items()))
