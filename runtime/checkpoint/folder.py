"""The checkpoints folder: which checkpoints are complete, clean-up after a killed save, atomic replacement, pruning.

Names: ``step-00000100`` is a checkpoint; ``step-00000100.tmp`` is being written or deleted and never counts;
``step-00000100.old`` exists only while a checkpoint of the same step replaces it, and counts as long as its successor
is missing. Only a complete folder is given such a name, and loses it again by a rename, so a kill at any point leaves
no incomplete checkpoint.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimaran.runtime.checkpoint.files import fsync_folder
from trimaran.runtime.checkpoint.manifest import CheckpointError, FileRecord, Manifest, load_manifest
from trimaran.runtime.files import check_regular

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_LEFTOVER = re.compile(r"step-\d{8,}(\.pruned)?\.tmp")


@dataclass(frozen=True)
class Found:
    """A folder with a checkpoint's name.

    `broken` says why it is incomplete; None where manifest and sizes are right.
    """

    step: int
    path: Path
    broken: str | None


def step_folder(folder: Path, step: int) -> Path:
    """Final name of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint folder; None for a folder under another name (a copy)."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def find_checkpoints(folder: Path) -> list[Found]:
    """Everything in `folder` with a checkpoint's name, oldest step first, complete or broken.

    Reads manifests and file sizes, not the data.
    """
    return [Found(step, path, _why_broken(step, path)) for step, path in _named(folder)]


def _named(folder: Path) -> list[tuple[int, Path]]:
    """Every folder with a checkpoint's name and its step, oldest first."""
    names: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        # Sorted order puts `step-N` before `step-N.old`, which counts only where its successor is missing.
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            names.setdefault(int(match[1]), path)
    return sorted(names.items())


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of `folder`, oldest first. A logged warning says why a broken one is left out."""
    return list(_whole(_named(folder)))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of `folder`, or None; older ones are not looked at.

    Checks the manifest and the file sizes; `Checkpoint.open` checks the digests.
    """
    return next(_whole(reversed(_named(folder))), None)


def _whole(named: Iterable[tuple[int, Path]]) -> Iterator[Path]:
    for step, path in named:
        broken = _why_broken(step, path)
        if broken is None:
            yield path
        else:
            logger.warning("ignoring broken checkpoint %s: %s", path.name, broken)


def newest_checkpoint(place: Path) -> Path | None:
    """Return the newest complete checkpoint of the run folder `place`, or `place` itself if it is a checkpoint."""
    return place if step_of(place) is not None else latest(place / "checkpoints")


def check_step(path: Path, step: int, manifest: Manifest) -> None:
    """Raise CheckpointError if the folder's name and its manifest have different steps."""
    if manifest.step != step:
        raise CheckpointError(f"{path.name} holds a manifest of step {manifest.step}: the folder was renamed by hand")


def check_sizes(path: Path, files: Sequence[FileRecord]) -> None:
    """Raise CheckpointError unless every file exists with its recorded size."""
    for record in files:
        try:
            size = check_regular(path / record.file).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"shard file {record.file} is missing or cannot be read ({error.strerror})"
            ) from error
        if size != record.size_bytes:
            raise CheckpointError(
                f"shard file {record.file} has {size} bytes, "
                f"the manifest says {record.size_bytes}: truncated or overwritten"
            )


def what_to_do(path: Path) -> str:
    """Advice for the broken checkpoint at `path`: which older one to use instead."""
    step = step_of(path)
    older = [
        found for found in find_checkpoints(path.parent) if found.broken is None and (step is None or found.step < step)
    ]
    if not older:
        return f"no older checkpoint in {path.parent} is whole; restore {path.name} from a copy or start the run anew"
    return (
        f"the newest older checkpoint with a sound manifest and complete files is {older[-1].path.name}; "
        f"move {path.name} out of {path.parent} and the run resumes from step {older[-1].step}"
    )


def clean_leftovers(folder: Path) -> None:
    """Undo what a killed save left in `folder`: delete temporary folders, finish or revert a replacement."""
    for path in list(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)
    for path in list(folder.iterdir()):
        if (match := _NAME.fullmatch(path.name)) and match[2]:
            successor = path.with_suffix("")
            if os.path.lexists(successor):
                _delete(path)
            else:
                path.rename(successor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete, fsynced `temporary` folder to `final`, replacing an earlier checkpoint of that name.

    A kill in the middle leaves the earlier one as ``.old``, which still counts as the checkpoint of that step.
    """
    old = final.with_name(final.name + ".old")
    replaces = os.path.lexists(final)  # not `exists`, which is false for a link to nowhere
    if replaces:
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
    fsync_folder(final.parent)
    if replaces:
        _delete(old)


def prune(folder: Path, keep_last: int, newest: Path) -> None:
    """Delete complete checkpoints beyond the `keep_last` of highest step; 0 keeps all. `newest` always stays.

    `newest` is the checkpoint just saved. In a run that went back to an earlier step it does not have the highest step,
    so both rules are needed. Broken folders are neither counted nor deleted: they may be all that is left of a run.
    """
    if keep_last == 0:
        return
    others = [path for path in list_checkpoints(folder) if path != newest]
    for path in others[: max(0, len(others) - (keep_last - 1))]:
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint folder.

    It is renamed first, so that a kill half-way does not leave an incomplete checkpoint.
    """
    doomed = path.with_name(path.name.removesuffix(".old") + ".pruned.tmp")
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder, or what has a folder's name: of a link the link alone, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _why_broken(step: int, path: Path) -> str | None:
    """Why the checkpoint in the folder is not complete, or None."""
    try:
        manifest = load_manifest(path)
        check_step(path, step, manifest)
        check_sizes(path, manifest.files)
    except CheckpointError as error:
        return str(error)
    return None
