"""What a session of tests makes once, though each of its workers needs it."""

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests import counting

T = TypeVar("T")


def session_folder() -> Path:
    """Return a folder that the workers of a session share; it is removed with the session's end."""
    folder = Path(os.environ[counting.FOLDER], "shared")
    folder.mkdir(exist_ok=True)
    return folder


def made_once(make: Callable[..., T], *arguments: Any) -> T:
    """Return what the function made of the arguments for the first worker that asked; others get a pickled copy.

    Args:
        arguments: with the function's name they tell one thing from another by their `repr`.
    """
    name = f"{make.__module__}.{make.__qualname__}{arguments!r}"
    file = session_folder() / hashlib.sha256(name.encode()).hexdigest()
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return pickle.loads(file.read_bytes())  # type: ignore[no-any-return]
        made = make(*arguments)
        file.write_bytes(pickle.dumps(made))
        return made
