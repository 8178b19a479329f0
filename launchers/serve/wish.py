"""What is told to the process that starts the ranks of a served model, and what it tells of a failure. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.files import read_json, write_text

WISH: Final = "wish.json"
FAILURE: Final = "failure.json"
SOCKET: Final = "ranks.socket"


@dataclass(frozen=True)
class Wish:
    """What shall be served, and how.

    Args:
        model: a run's folder, a checkpoint, or the folder of a Hugging Face model.
        slots: texts that each dp replica continues at the same time.
        context: most tokens of a prompt and its continuation; None for the model's.
        logs: where ranks keep their output; None for beside the socket.
    """

    model: str
    tp: int
    pp: int
    dp: int
    slots: int
    context: int | None
    logs: str | None


@dataclass(frozen=True)
class StartFailure:
    """Why the ranks have ended.

    Args:
        is_wrong_value: whether the wish can't be fulfilled, and nothing has begun.
    """

    message: str
    is_wrong_value: bool = False


def write_wish(folder: Path, wish: Wish) -> None:
    """Write what `main` reads."""
    write_text(folder / WISH, json.dumps(asdict(wish)))


def read_wish(folder: Path) -> Wish:
    """Return the wish in a folder."""
    return Wish(**read_json(folder / WISH))


def read_failure(folder: Path) -> StartFailure | None:
    """Return why the ranks have ended; None where they have not said."""
    try:
        return StartFailure(**read_json(folder / FAILURE))
    except (OSError, ValueError, TypeError):
        return None


def write_failure(folder: Path, failure: StartFailure) -> None:
    """Write what `read_failure` reads."""
    write_text(folder / FAILURE, json.dumps(asdict(failure)))
