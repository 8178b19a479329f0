"""Shared by the commands: the types of their arguments, errors as sentences with an exit code, finding a checkpoint.

Imports no torch.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from signal import SIGINT, SIGPIPE
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimaran.launchers.env.exit_codes import LaunchError, Stopped, exit_code_after
from trimaran.launchers.terminal import OUTPUT, is_for_users, say, say_error

if TYPE_CHECKING:
    from trimaran.runtime.infer.batching.messages import Backend


def path(text: str) -> Path:
    """Return the path that is written on the command line.

    Path("") is the current folder, and nobody who writes "" (an unset variable, most often) means that one.
    """
    if not text.strip():
        raise typer.BadParameter("the path is empty; write one, or . for the current folder")
    return Path(text)


SpecPath = Annotated[Path, typer.Argument(parser=path, metavar="SPEC", help="The run spec, a YAML file.")]
SpecOrRun = Annotated[
    Path, typer.Argument(parser=path, metavar="SPEC|RUN", help="The run spec, a YAML file; or a run's folder.")
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as parallel.tp=2; may be repeated."),
]
Launcher = Annotated[
    Literal["local", "slurm", "mpi"] | None, typer.Option(help="In place of the spec's launcher.kind.")
]
RunPath = Annotated[
    Path, typer.Argument(parser=path, metavar="RUN", help="A run folder, or one checkpoint folder of it.")
]

ToLanguage = Annotated[
    str | None, typer.Option(metavar="LANGUAGE", help="With --mode translate: a code such as tr or de.")
]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to run at.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree to run at.")]
StopTexts = Annotated[list[str], typer.Option("--stop", help="End before this text; may be repeated.")]
NoRetrieval = Annotated[
    bool, typer.Option("--no-retrieval", help="Of a twin: let the weights alone answer, without its library.")
]


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turn errors that a user can cause into a sentence and an exit code; others are bugs and keep their traceback."""
    try:
        yield
    except Stopped as stopped:
        say(str(stopped), style="yellow")
        raise typer.Exit(exit_code_after(stopped.signal_number)) from None
    except KeyboardInterrupt:
        say("stopped by SIGINT before any rank was started", style="yellow")
        raise typer.Exit(exit_code_after(SIGINT)) from None
    except LaunchError as error:
        say_error(error)
        raise typer.Exit(error.exit_code if 0 < error.exit_code < 256 else 1) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == OUTPUT:  # its reader, such as head, has read enough
            raise typer.Exit(exit_code_after(SIGPIPE)) from None
        if not is_for_users(error):
            raise
        say_error(error)
        raise typer.Exit(2) from None


SLOTS = 8
"""Texts that are continued at the same time where several are."""


@asynccontextmanager
async def ranks_of(checkpoint: Path, *, tp: int, pp: int, slots: int = SLOTS) -> "AsyncIterator[Backend]":
    """Start the ranks of a checkpoint; they end with the context.

    Args:
        slots: texts that are continued at the same time.

    Raises:
        ValueError: the model can't be cut like that.
        BackendGoneError: the ranks have failed.
    """
    from trimaran.launchers.serve.ranks import RankBackend

    backend = await RankBackend.start(checkpoint, tp=tp, pp=pp, slots=slots)
    try:
        yield backend
    finally:
        await backend.close()
