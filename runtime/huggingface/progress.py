"""How a conversion reports its progress, independent of how that is displayed."""

from collections.abc import Callable
from dataclasses import dataclass


def _silent(text: str) -> None:
    """Say nothing."""


def _unseen(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Progress:
    """Receivers of messages and progress.

    Args:
        say: called with a sentence for the user.
        advance: called with (what is being done, amount done, total amount).
    """

    say: Callable[[str], None] = _silent
    advance: Callable[[str, int, int], None] = _unseen
