"""Disk access shared by `runtime/data`: DataError, content hashes, and folders that are created atomically."""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from trimaran.runtime.files import open_regular, read_json
from trimaran.runtime.folder_lock import NO_JOB, FolderLock

READ_BYTES = 1 << 20
# A file that changes again within a clock tick keeps its time stamp; ticks of file systems last up to 2 s (FAT).
_TICK_NS = 2_000_000_000
_SAY_BYTES = 4 << 30
_RANDOM = 12
"""Characters of the name of a folder that is being made."""
_Examined = tuple[int, int, str]
"""Size, time of change in ns, and result of a file."""

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A corpus, tokenizer or token shard that can't be used.

    The message names the file, the rule and what to change.
    """


class NotPrepared(DataError):
    """Data that was looked for on disk is not there yet."""


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal; DataError when it can't be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


class KnownFile(NamedTuple):
    """A file of known content: its path, size and time of change in ns as they were before it was read, and sha256."""

    path: str
    size: int
    changed_ns: int
    sha256: str

    def check(self) -> None:
        """Raise DataError where the file has changed since."""
        if _stamp(Path(self.path)) != (self.size, self.changed_ns):
            raise DataError(f"{self.path} has changed since its work was laid out; run the command again")


def know_files(paths: Sequence[Path], record: Path) -> list[KnownFile]:
    """Return the files with their sha256; see `once_per_change`."""
    stamps = [_stamp(path) for path in paths]
    hashes = once_per_change(paths, record, hash_file)
    return [KnownFile(str(path), *stamp, each) for path, stamp, each in zip(paths, stamps, hashes, strict=True)]


def once_per_change(paths: Sequence[Path], record: Path, examine: Callable[[Path], str]) -> list[str]:
    """Return `examine(path)` of each file; a file that has not changed since it was last examined is not read again.

    Unchanged means: `record`, a JSON file that this function keeps, has the file's size and time of change. Files are
    read in parallel. Raises DataError for a file that can't be read.
    """
    known, settled = _read_record(record), time.time_ns() - _TICK_NS
    names = [os.path.relpath(path, record.parent) for path in paths]
    stamps = [_stamp(path) for path in paths]
    unchanged = {name for name, stamp in zip(names, stamps, strict=True) if known.get(name, ())[:2] == stamp}
    results = {name: known[name][2] for name in unchanged}
    new = [index for index, name in enumerate(names) if name not in results]
    size = sum(stamps[index][0] for index in new)
    if size > _SAY_BYTES:
        logger.info("reading %.1f GB in %d files that are new or have changed, to recognize them", size / 1e9, len(new))
    found = _in_threads(examine, [paths[index] for index in new])
    results |= {names[index]: result for index, result in zip(new, found, strict=True)}
    fresh = {
        name: (*stamp, results[name])
        for name, stamp in zip(names, stamps, strict=True)
        if name in unchanged or stamp[1] < settled
    }
    if fresh != known:
        _write_record(record, fresh)
    return [results[name] for name in names]


def _in_threads(examine: Callable[[Path], str], paths: Sequence[Path]) -> list[str]:
    """Return `examine` of each path, in order. Ctrl-C does not wait for files that are being read: threads are daemons.

    ThreadPoolExecutor would wait; ThreadPool makes semaphores, which outlive a killed process.
    """
    pending: SimpleQueue[int] = SimpleQueue()
    results: dict[int, str] = {}
    errors: list[Exception] = []
    for index in range(len(paths)):
        pending.put(index)

    def work() -> None:
        with suppress(Empty):
            while not errors:
                index = pending.get_nowait()
                try:
                    results[index] = examine(paths[index])
                except Exception as error:  # noqa: BLE001 - raised below, in the thread that called
                    errors.append(error)

    threads = [Thread(target=work, daemon=True) for _ in range(min(32, len(os.sched_getaffinity(0)), len(paths)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(paths))]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _read_record(record: Path) -> dict[str, _Examined]:
    """Return the record's rows by file; a record that is missing or damaged has none."""
    with suppress(OSError, ValueError):
        content = read_json(record)
        if isinstance(content, dict):
            rows = {name: tuple(row) for name, row in content.items() if isinstance(row, list)}
            return {name: row for name, row in rows.items() if [type(value) for value in row] == [int, int, str]}
    return {}


def _write_record(record: Path, content: dict[str, _Examined]) -> None:
    temporary = record.with_name(f".{record.name}.{uuid.uuid4().hex[:12]}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(record)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        logger.info("%s can't be written (%s), so the next start reads these files again", record, error.strerror)


def unreadable(path: Path, error: BaseException, remedy: str = "take it out of data.source") -> DataError:
    """The error for a file that exists but can't be read; `remedy` is what else to do than to mend it."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(f"cannot read {path}: {reason}; check that it is a whole, readable file, or {remedy}")


def build_once(target: Path, build: Callable[[Path], None], environment: Mapping[str, str] = NO_JOB) -> None:
    """Build a folder unless it is there: one process builds it, and others with the same target wait for that.

    Args:
        environment: see `Holder.here`.
    """
    if target.exists():
        return
    try:
        lock = FolderLock.beside(target, "trimaran train", environment, waits=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock:
        if not target.exists():
            for left in target.parent.glob(f".{target.name}.{'?' * _RANDOM}"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
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
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:_RANDOM]}"
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
