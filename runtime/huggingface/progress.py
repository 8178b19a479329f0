"""How a conversion tells where it stands, without knowing what it is shown on."""

from collections.abc import Callable
from dataclasses import dataclass


def _silent(text: str) -> None:
    """Say nothing."""


def _unseen(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Progress:
    """Where words and numbers go.

    Args:
        say: called with a sentence that the user should read.
        advance: called with (what is under way, how much is done, of how much).
    """

    say: Callable[[str], None] = _silent
    advance: Callable[[str, int, int], None] = _unseen
