"""The arrays of a part on disk: an uncompressed .npz, never a pickle, with the settings that made it."""

import json
import os
import struct
import threading
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import naming, open_regular, parse_json

Array: TypeAlias = npt.NDArray[Any]
Settings: TypeAlias = Mapping[str, int | float | str]
_SETTINGS: Final = "settings"


class Arrays(Protocol):
    """The arrays of a part by name: a dict, or a `SavedArrays`, which reads each from disk when it is asked for."""

    def __getitem__(self, name: str, /) -> Array:
        """Return an array."""


def save_arrays(path: Path, arrays: Mapping[str, Array], settings: Settings) -> None:
    """Write arrays to an .npz file; the same arrays and settings give the same bytes.

    Another file of that name stays as it is until the new one is whole.

    Raises:
        OSError: it can't be written.
    """
    described = np.frombuffer(json.dumps(dict(settings), sort_keys=True).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **{_SETTINGS: described}, **arrays)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


class SavedArrays:
    """The arrays that `save_arrays` wrote; nothing is kept open or in memory.

    Raises:
        DataError: the file is damaged, of another kind, or was made with other settings.
        OSError: it can't be read.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._places: dict[str, tuple[int, np.dtype[Any]]] = {}
        try:
            made_with = parse_json(self[_SETTINGS].tobytes())
        except (KeyError, ValueError) as error:
            raise self._damaged(error) from error
        if made_with != dict(settings):
            names = sorted(name for name in {*made_with, *settings} if made_with.get(name) != settings.get(name))
            other = ", ".join(f"{name} {made_with.get(name)} instead of {settings.get(name)}" for name in names)
            raise DataError(f"{path} was made with other settings ({other}); make it again, or use its settings here")

    def __getitem__(self, name: str) -> Array:
        """Return an array; KeyError where the file has none of that name."""
        try:
            with open_regular(self._path) as file, np.load(file, allow_pickle=False) as arrays:
                array: Array = arrays[name]
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error
        return array

    def window(self, name: str, start: int, stop: int) -> Array:
        """Return the elements [start, stop) of an array of one dimension, reading only these."""
        try:
            with open_regular(self._path) as file:
                if name not in self._places:
                    self._places[name] = _find_elements(file, name)
                offset, dtype = self._places[name]
                file.seek(offset + start * dtype.itemsize)
                return np.frombuffer(file.read((stop - start) * dtype.itemsize), dtype)
        except (KeyError, ValueError, EOFError, struct.error, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self._path} does not hold whole arrays of this program ({error}); delete it and run again")


def _find_elements(file: BufferedReader, name: str) -> tuple[int, np.dtype[Any]]:
    """Return the place of an array's first element in an uncompressed .npz file, and its dtype."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy").header_offset
    # 26 bytes of the member's header, then the lengths of its name and of its extra field (APPNOTE 4.3.7).
    file.seek(member + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    np.lib.format.read_magic(file)
    _, _, dtype = np.lib.format.read_array_header_1_0(file)
    return file.tell(), dtype


def window(arrays: Arrays, name: str, start: int, stop: int) -> Array:
    """Return the elements [start, stop) of an array of one dimension; of a saved one only these are read."""
    return arrays.window(name, start, stop) if isinstance(arrays, SavedArrays) else arrays[name][start:stop]
