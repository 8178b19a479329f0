"""Disk access shared by `runtime/data`: DataError, content hashes, and folders that are created atomically."""

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimaran.runtime.folder_lock import FolderLock

_READ_BYTES = 1 << 20


class DataError(ValueError):
    """A corpus, tokenizer or token shard that can't be used.

    The message names the file, the rule and what to change.
    """


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal; DataError when it can't be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error for a file that exists but can't be read."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(
        f"cannot read {path}: {reason}; check that it is a whole, readable file, or take it out of data.source"
    )


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Build a folder unless it is there: one process builds it, and others with the same target wait for that."""
    if target.exists():
        return
    try:
        lock = FolderLock.beside(target, "trimaran train", waits=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock:
        if not target.exists():
            with new_folder(target) as temporary:
                build(temporary)


def _unwritable(target: Path, error: OSError) -> DataError:
    return DataError(f"cannot write under {target.parent}: {error.strerror}; point data.cache_dir at a writable folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `target` when the block ends and removed when it raises.

    When two processes build the same target at once, the first to finish wins and the other's copy is discarded. Both
    continue with the same content, since the name of a target depends on everything that decides its content.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
