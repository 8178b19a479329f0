"""Reading files that anyone may have made, and writing files that are whole or not there. Imports no torch.

Only regular files are read, and no more of one than it should hold. Errors name their file.
"""

import errno
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

MOST_BYTES: Final = 256 << 20
"""An index of 100,000 tensors has 10 MiB, a tokenizer of 256,000 tokens 33 MiB."""
_KINDS: Final = MappingProxyType(
    {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
)


def check_regular(path: Path) -> Path:
    """Return `path` where it is a regular file or a link to one, for a function that opens it by its name.

    To open a pipe would wait for a writer, perhaps for ever, and a device such as /dev/zero has no end.

    Raises:
        OSError: it is something else, or it is missing.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and only regular files are read", str(path))
    return path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it can't be opened, or is no regular file.
    """
    return check_regular(path).open("rb")


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it can't be read, is no regular file, or has more than `most_bytes`.
    """
    with naming(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read() if size <= most_bytes else b""
    if max(size, len(content)) > most_bytes:  # a file of /proc says that it has 0 bytes
        most = f"{most_bytes >> 20} MiB" if most_bytes >= 1 << 20 else f"{most_bytes >> 10} KiB"
        raise OSError(errno.EFBIG, f"it has more than {most}, too much for what it should hold", str(path))
    return content


def read_text(path: Path, most_bytes: int = MOST_BYTES, *, errors: str = "strict") -> str:
    """Return the UTF-8 text of a regular file, with the line ends of any system as newlines.

    Raises:
        UnicodeDecodeError: it is not UTF-8 and `errors` is "strict".
        OSError: as for `read_bytes`.
    """
    return read_bytes(path, most_bytes).decode("utf-8", errors).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(content: bytes | str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text; `parse_constant` is that of `json.loads`.

    Raises:
        ValueError: it is not JSON, not Unicode, nested deeper than Python's parser goes, or has a number of more digits
            than Python reads.
    """
    try:
        return json.loads(content, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError(f"it has a number of more than {sys.get_int_max_str_digits():,} digits") from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return the value that a JSON file holds.

    Raises:
        ValueError: as for `parse_json`.
        OSError: as for `read_bytes`.
    """
    return parse_json(read_bytes(path, most_bytes))


def write_text(path: Path, text: str) -> None:
    """Write a text file: another one of that name stays as it is until the new one is whole.

    Raises:
        OSError: it can't be written; the error names the file, which the system does not where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with naming(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the system in the block name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
