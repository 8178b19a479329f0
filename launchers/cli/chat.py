"""`trimaran chat`: check the options and hold a conversation. Imports no torch before the options are valid."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.common.console import (
    SLOTS,
    NoRetrieval,
    Pp,
    RunPath,
    StopTexts,
    ToLanguage,
    Tp,
    errors_as_sentences,
    path,
    ranks_of,
)
from trimaran.launchers.cli.common.option_records import SamplingOptions, option_records
from trimaran.launchers.run_folder import find_checkpoint

_SAMPLING = SamplingOptions(512)


@option_records
def chat(
    run: RunPath,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first question.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="answer, translate, summarize, or continue, all that a model without a chat template can do.",
        ),
    ] = "answer",
    to: ToLanguage = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder of the conversations that /save writes and /load reads; here by default."
        ),
    ] = None,
    no_retrieval: NoRetrieval = False,
    sampling: SamplingOptions = _SAMPLING,
    stop: StopTexts = [],  # noqa: B006 - typer reads it
    tp: Tp = 1,
    pp: Pp = 1,
) -> None:
    """Talk with a model in the terminal, or line by line through pipes, straight from a training checkpoint."""
    with errors_as_sentences():
        params = sampling.params()
        from trimaran.launchers.chat.start import Conversation, hold
        from trimaran.runtime.infer.modes import mode_of
        from trimaran.runtime.infer.prompts import check_typed_text

        for option, text in (("--system", system), *(("--stop", each) for each in stop)):
            check_typed_text(option, text)
        if "" in stop:
            raise ValueError("--stop must have at least one character")
        chosen = mode_of(mode, to)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--folder ({folder}) does not exist; make it, or name another one")
        checkpoint = find_checkpoint(run)
        place, retrieval = folder or Path(), not no_retrieval
        conversation = Conversation(
            checkpoint.parent.parent, chosen, params, tuple(stop), system, place, retrieval=retrieval
        )
        slots = SLOTS if chosen.is_by_passages else 1
        code = asyncio.run(hold(conversation, lambda: ranks_of(checkpoint, tp=tp, pp=pp, slots=slots)))
    raise typer.Exit(code)
