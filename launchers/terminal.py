"""Sentences on the terminal's error stream, from commands and from ranks. Imports no torch."""

from rich.console import Console


def say(text: str, style: str | None = None) -> None:
    """Print a sentence without wrapping it: a path that is broken in two can't be copied."""
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def sentence(error: Exception) -> str:
    """Return an error as a sentence for a user."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def say_error(error: Exception) -> None:
    """Print an error as a sentence."""
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(sentence(error), markup=False, soft_wrap=True)
