"""The process of a `RewardProcess`: reads calls as JSON lines, and answers each by a line. Runs users' code."""

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimaran.runtime.processes import exit_with_parent

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2
_SHOWN = 500  # characters of an error's message


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Return a function of a Python file, which is run for it.

    Raises:
        ValueError: it has no such function.
    """
    specification = importlib.util.spec_from_file_location("trimaran_reward", file)
    assert specification is not None, "the name of the file ends in .py"
    assert specification.loader is not None, "it is a file of source"
    sys.path.append(str(file.parent))  # for what it imports from beside it
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name}")  # noqa: TRY004 - a sentence for the user
    return function  # type: ignore[no-any-return]


def describe(error: BaseException, file: Path) -> str:
    """Return a line about an error of users' code, with the last line of the file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f", {file}, line {lines[-1]}" if lines else ""
    told = " ".join(str(error).split())  # a message may have lines of its own
    return f"{type(error).__name__}: {told[:_SHOWN]}{'...' if len(told) > _SHOWN else ''}{where}"


def main() -> None:
    """Answer calls until the standard input ends."""
    calls = os.fdopen(os.dup(_INPUT), "rb")
    answers = os.fdopen(os.dup(_OUTPUT), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _INPUT)  # what users' code reads and prints is not ours
    os.dup2(_ERRORS, _OUTPUT)
    parent, path, name = json.loads(calls.readline())
    exit_with_parent(parent)
    file, function = Path(path), None
    try:
        function = load_function(file, name)
        answer: dict[str, Any] = {"value": None}
    except Exception as error:  # noqa: BLE001 - users' code may raise anything
        answer = {"error": describe(error, file)}
    answers.write(json.dumps(answer).encode() + b"\n")
    if function is None:
        return
    for line in calls:
        try:
            value = function(*json.loads(line))
            answer = {"value": float(value) if hasattr(value, "__float__") else repr(value)}
        except Exception as error:  # noqa: BLE001 - as above
            answer = {"error": describe(error, file)}
        answers.write(json.dumps(answer).encode() + b"\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
