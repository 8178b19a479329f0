"""`trimaran chat`: check the options and hold a conversation. Imports no torch before the options are valid."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.console import (
    SLOTS,
    RunPath,
    ToLanguage,
    errors_as_sentences,
    find_checkpoint,
    path,
    ranks_of,
)
from trimaran.runtime.infer.sampling_params import SamplingParams


def chat(
    run: RunPath,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first question.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="answer|continue|translate|summarize",
            help="What becomes of each text; a model without a chat template can only continue.",
        ),
    ] = "answer",
    to: ToLanguage = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder of the conversations that /save writes and /load reads; here by default."
        ),
    ] = None,
    no_retrieval: Annotated[
        bool, typer.Option("--no-retrieval", help="Of a twin: let the weights alone answer, without its library.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    min_new_tokens: Annotated[int, typer.Option(help="No stop token before that many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0 for all.")] = 40,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability; 1 for all.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with this part of the likeliest one's probability; 0 for all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that the text has already less likely.")
    ] = 1.0,
    stop: Annotated[list[str], typer.Option("--stop", help="End an answer before this text; may be repeated.")] = [],  # noqa: B006 - typer reads it
    seed: Annotated[int, typer.Option(help="Another seed, other answers.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to run at.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree to run at.")] = 1,
) -> None:
    """Talk with a model in the terminal, or line by line through pipes, straight from a training checkpoint."""
    with errors_as_sentences():
        sampling = SamplingParams(
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            min_new_tokens,
            seed,
            context="stop",
        )
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
            checkpoint.parent.parent, chosen, sampling, tuple(stop), system, place, retrieval=retrieval
        )
        slots = SLOTS if chosen.is_by_passages else 1
        code = asyncio.run(hold(conversation, lambda: ranks_of(checkpoint, tp=tp, pp=pp, slots=slots)))
    raise typer.Exit(code)
