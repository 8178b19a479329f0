"""A folder that appears complete or not at all: filled under a hidden name beside its target, then renamed."""

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trimaran.runtime.checkpoint.files import fsync_folder
from trimaran.runtime.folder_lock import NO_JOB, FolderLock
from trimaran.runtime.huggingface.refusals import ConversionError


@contextmanager
def new_folder(target: Path, environment: Mapping[str, str] = NO_JOB) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `target` when the block ends and removed if it fails.

    A process that is killed leaves the temporary folder behind; the next one on this machine with the same target
    removes it.

    Args:
        environment: see `Holder.here`.

    Raises:
        ConversionError: the target exists already, or can't be made.
        FolderInUse: another process makes it right now, or runs in it.
    """
    _refuse_existing(target)
    temporary = target.parent / f".{target.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    with ExitStack() as stack:
        try:
            stack.enter_context(FolderLock.beside(target, "trimaran import or export", environment))
            _remove_leftovers(target)
            temporary.mkdir()
        except OSError as error:
            raise ConversionError(
                f"{target} can't be made: {error.strerror} ({error.filename}); choose another folder"
            ) from error
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary
        _refuse_existing(target)
        temporary.rename(target)
        fsync_folder(target.parent)


def check_disk_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ConversionError where the disk of `folder` has less free space than `num_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{what} takes {num_bytes / 2**30:.1f} GiB, and the disk of {folder.parent} has {free / 2**30:.1f} GiB "
            "left; make room there, or choose a folder on another disk"
        )


def _refuse_existing(target: Path) -> None:
    """Raise ConversionError where the target exists, unless it is an empty folder: a rename replaces that."""
    is_empty_folder = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if not target.name or ((target.exists() or target.is_symlink()) and not is_empty_folder):
        raise ConversionError(f"{target} is there already; choose another folder, or remove it first")


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary folders of processes that ran on this machine and have ended."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(socket.gethostname())}-(\d+)\.tmp")
    for path in list(target.parent.iterdir()):
        if (match := pattern.fullmatch(path.name)) and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
