"""Ports for programs that must be told one: reserved for this process, and none that the kernel gives out by itself."""

import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

FIRST, LAST = 20000, 32000  # the kernel gives out 32768 and more
_RESERVED: list[IO[str]] = []
"""Locked files, one a port, so that no test of another process takes a port before the program that it is for does."""


def free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row, which no later call returns here or in another process."""
    folder = Path(tempfile.gettempdir(), "trimaran-ports")
    folder.mkdir(exist_ok=True)
    for first in range(FIRST + os.getpid() % 100 * 100, LAST, count):
        files: list[IO[str]] = []
        with suppress(OSError):
            for port in range(first, first + count):
                files.append((folder / str(port)).open("w"))
                fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                socket.create_server(("127.0.0.1", port)).close()
            _RESERVED.extend(files)
            return first
        for file in files:
            file.close()
    raise OSError(f"no {count} free ports in a row")
