"""What a worker does right now, written where its supervisor reads it: a document that takes too long is found so.

A document may hang inside a library that holds the interpreter, so nothing in the worker itself can end it. The worker
writes which document it is at into a small mapped file; its supervisor kills it where that stays the same for too long,
and notes the document, which the next attempt leaves out.
"""

import json
import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimaran.runtime.files import read_json

# Documents begun, when the current one began (0: none), its number. In native form each is written at once: half of a
# time would look like one of long ago.
_STATE = struct.Struct("@Qdq")
_TASK_BYTES = 1024
_SIZE = 4096


class Watch:
    """Tells the supervisor of the document that is being worked on; without a file it tells nobody.

    Attributes:
        slow: numbers of the task's documents that are to be left out, because they took too long before.
    """

    def __init__(self, board: "Board | None" = None, slow: frozenset[int] = frozenset()) -> None:
        self._board, self.slow = board, slow

    @contextmanager
    def document(self, number: int) -> Iterator[None]:
        """Be at document `number` of the task for the time of the block."""
        if self._board is None:
            yield
            return
        self._board.begin(number)
        try:
            yield
        finally:
            self._board.end()


class Board:
    """The mapped file between a worker and its supervisor."""

    def __init__(self, path: Path) -> None:
        """Map the file, which is made where it is missing."""
        with path.open("a+b") as file:
            file.truncate(_SIZE)
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._begun = self.begun

    @property
    def begun(self) -> int:
        """How many documents have been begun, by all workers that had the board."""
        return int(_STATE.unpack_from(self._map, 0)[0])

    def task(self, slow_file: str) -> None:
        """Announce the file in which a slow document of the task is to be noted."""
        content = slow_file.encode()[:_TASK_BYTES]
        self._map[_STATE.size : _STATE.size + _TASK_BYTES] = content.ljust(_TASK_BYTES, b"\0")

    def begin(self, number: int) -> None:
        """Note that a document begins now."""
        self._begun += 1
        _STATE.pack_into(self._map, 0, self._begun, time.monotonic(), number)

    def end(self) -> None:
        """Note that it ended."""
        _STATE.pack_into(self._map, 0, self._begun, 0.0, -1)

    def overdue(self, most_s: float) -> tuple[Path, int] | None:
        """Return the file to note it in and the number of a document that has taken more than `most_s` seconds."""
        state = begun, since, number = _STATE.unpack_from(self._map, 0)
        if not begun or not since or time.monotonic() - since <= most_s:
            return None
        if _STATE.unpack_from(self._map, 0) != state:  # it has just ended, and the number may be the next one's
            return None
        name = self._map[_STATE.size : _STATE.size + _TASK_BYTES].rstrip(b"\0").decode()
        return Path(name), number


def slow_documents(path: Path) -> frozenset[int]:
    """Return the numbers of documents that took too long in earlier attempts at a task."""
    try:
        return frozenset(int(number) for number in read_json(path))
    except FileNotFoundError:
        return frozenset()


def note_slow(path: Path, number: int) -> None:
    """Add a document to those that are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(sorted({*slow_documents(path), number})), encoding="utf-8")
    temporary.replace(path)
