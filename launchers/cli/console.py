"""What every command shares: its arguments' types, words to the terminal, errors as sentences with an exit code, and finding a checkpoint. No torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import Annotated

import typer
from rich.console import Console

from trimaran.launchers.env.exit_codes import LaunchError, Stopped

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one checkpoint folder of it.")]


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the program with one sentence and a code for what a user can cause; anything else is a bug and shows its traceback."""
    try:
        yield
    except Stopped as stopped:
        say(str(stopped), style="yellow")
        raise typer.Exit(128 + stopped.signal_number) from None
    except KeyboardInterrupt:
        say("stopped by SIGINT before any rank was started", style="yellow")
        raise typer.Exit(128 + SIGINT) from None
    except LaunchError as error:
        _complain(error)
        raise typer.Exit(error.exit_code if 0 < error.exit_code < 256 else 1) from None
    except (ValueError, OSError, _checkpoint_error()) as error:
        _complain(error)
        raise typer.Exit(2) from None


def say(text: str, style: str | None = None) -> None:
    """Print to the terminal's error stream; never wrapped: a path that is broken in two can't be copied."""
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def sentence(error: Exception) -> str:
    """Return what an error says to a user."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def find_checkpoint(run: Path) -> Path:
    """Return the newest whole checkpoint of a run folder, or the checkpoint folder itself; ValueError where there is none."""
    from trimaran.runtime.checkpoint.folder import latest, step_of

    if step_of(run) is not None:
        return run
    found = latest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} has no whole checkpoint; give the folder of a run that `trimaran train` has made")
    return found


def _checkpoint_error() -> type[Exception]:
    """CheckpointError, where its room (and torch) has been imported; a class that nothing raises where it hasn't."""
    module = sys.modules.get("trimaran.runtime.checkpoint.manifest")
    return getattr(module, "CheckpointError", LaunchError)


def _complain(error: Exception) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(sentence(error), markup=False, soft_wrap=True)
