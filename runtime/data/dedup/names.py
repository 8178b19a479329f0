"""The ids of documents by number, on disk: in memory those of a large corpus would take more than what is compared."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

_IDS: Final = "ids.bin"
_ENDS: Final = "ends.bin"
_END_BYTES: Final = 8


class Named(Protocol):
    """The ids of documents by number: a dict, or `Names`, which reads each from disk when it is asked for."""

    def __getitem__(self, number: int, /) -> str:
        """Return the id of a document."""


def write_names(folder: Path, ids: Iterable[str]) -> None:
    """Write the ids of documents, which have the numbers from 0 on, into a folder."""
    end = 0
    with (folder / _IDS).open("wb") as names, (folder / _ENDS).open("wb") as ends:
        for name in ids:
            content = name.encode()
            end += len(content)
            names.write(content)
            ends.write(end.to_bytes(_END_BYTES, "little"))


class Names:
    """The ids that `write_names` wrote. A context manager.

    Args:
        first: number in the folder of the document that is number 0 here.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        self._folder, self._first = folder, first

    def __enter__(self) -> Self:
        self._ids, self._ends = (os.open(self._folder / name, os.O_RDONLY) for name in (_IDS, _ENDS))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.close(self._ids)
        os.close(self._ends)

    def __getitem__(self, number: int) -> str:
        """Return the id of a document."""
        place = self._first + number
        start = self._end(place - 1) if place else 0
        return os.pread(self._ids, self._end(place) - start, start).decode()

    def _end(self, place: int) -> int:
        return int.from_bytes(os.pread(self._ends, _END_BYTES, place * _END_BYTES), "little")
