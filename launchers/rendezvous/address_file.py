"""The file of the run folder in which rank 0 of a start leaves its address: Slurm's tasks can't exchange it otherwise.

Written for network file systems, where a file may be seen late, half written, or replaced while it is read. Imports no
torch: rank 0 shows that it lives while it is still importing.
"""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimaran.runtime.files import read_json

_SIGN_S = 2.0


class AddressFile:
    """The address file of one start."""

    def __init__(self, folder: Path, start: str) -> None:
        self.path = folder / f".meet-{start}.json"
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return str(self.path)

    def announce(self) -> None:
        """On rank 0: change the file every two seconds from here on, until the address is in it."""
        self._thread = threading.Thread(target=self._give_signs, name="sign-of-life", daemon=True)
        self._thread.start()

    def publish(self, address: str, port: int, node: str, nonce: str) -> None:
        """On rank 0: leave the address. nonce: the store there has it too."""
        self.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write({"address": address, "port": port, "node": node, "nonce": nonce})

    def read(self) -> dict[str, Any]:
        """Return what rank 0 has left, {} where that is nothing yet or can't be read right now."""
        try:
            # A client of NFS may have cached that the file is not there; listing its folder asks the server.
            os.listdir(self.path.parent)
            found = read_json(self.path)
        except (OSError, ValueError):  # also ESTALE, where it is replaced meanwhile, and a half-written file
            return {}
        return found if isinstance(found, dict) else {}

    def stop(self) -> None:
        """End the signs of life."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def remove(self) -> None:
        """On rank 0: remove the file, so that a later start does not read it."""
        self.stop()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _give_signs(self) -> None:
        count = 0
        while True:
            count += 1
            with suppress(OSError):  # the folder is not there yet, or its file server away
                self._write({"signs": count})
            if self._done.wait(_SIGN_S):
                return

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
