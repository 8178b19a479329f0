"""`trimaran generate`: turn the options into a task for the ranks. Imports no torch before the options are valid."""

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimaran.launchers.cli.common.console import (
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
from trimaran.launchers.env.exit_codes import LaunchError, Stopped, exit_code_after
from trimaran.launchers.local.launch import launch_folder
from trimaran.launchers.run_folder import find_checkpoint
from trimaran.launchers.terminal import discard_output, say
from trimaran.runtime.files import read_text
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.scratch import scratch_folder

if TYPE_CHECKING:
    from trimaran.runtime.infer.modes import Mode
    from trimaran.runtime.infer.prompts import Prompt

_SAMPLING = SamplingOptions(200)
_DEFAULT_PROMPT = "The "
_MOST_BYTES = 64 << 20  # of a text for --file
_Mode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="continue (default), answer, translate or summarize; the last two take texts of any length.",
    ),
]
_File = Annotated[
    Path | None, typer.Option(parser=path, help="With --mode translate or summarize: a text of any length, in a file.")
]
_StopTokens = Annotated[
    list[str], typer.Option("--stop-token", help="End at this token of the vocabulary; may be repeated.")
]
_Context = Annotated[
    Literal["slide", "stop"], typer.Option(help="When the model's context is full: go on from its newer half, or stop.")
]


@option_records
def generate(
    run: RunPath,
    prompt: Annotated[str | None, typer.Option(help=f"Text to continue; {_DEFAULT_PROMPT!r} unless told.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="File of prompts, - for standard input: a text a line, or in a .jsonl file a JSON value a line. "
            "Results are printed as JSON, one a line.",
        ),
    ] = None,
    file: _File = None,
    mode: _Mode = None,
    to: ToLanguage = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts to the model as a user's questions: --mode answer.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat or --mode: what the model is told first.")] = None,
    sampling: SamplingOptions = _SAMPLING,
    stop: StopTexts = [],  # noqa: B006 - typer reads it
    stop_token: _StopTokens = [],  # noqa: B006
    context: _Context = "slide",
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: how many are continued together.")] = 16,
    tp: Tp = 1,
    pp: Pp = 1,
) -> None:
    """Continue a prompt, or each of a file of prompts, straight from a training checkpoint, at any layout."""
    with errors_as_sentences():
        params = sampling.params(context)
        from trimaran.runtime.infer.prompts import check_typed_text

        named = [("--prompt", prompt), ("--system", system), *(("--stop", each) for each in stop)]
        for option, text in (*named, *(("--stop-token", each) for each in stop_token)):
            check_typed_text(option, text)
        if "" in stop:
            raise ValueError("--stop must have at least one character")
        chosen = _mode(mode, to, chat)
        inputs = _read_prompts(prompt, prompts, file, chosen, system)
        if chosen.is_by_passages:
            from trimaran.launchers.chat.passages import Texts, put

            checkpoint, is_many = find_checkpoint(run), prompts is not None
            texts = (checkpoint.parent.parent, inputs, chosen, params, tuple(stop), tuple(stop_token))
            asyncio.run(put(Texts(*texts, system, is_many), lambda: ranks_of(checkpoint, tp=tp, pp=pp)))
            return
        _generate(
            find_checkpoint(run),
            inputs,
            params,
            stop,
            stop_token,
            batch_size=batch_size,
            as_json=prompts is not None,
            tp=tp,
            pp=pp,
        )


def _mode(mode: str | None, to: str | None, chat: bool) -> "Mode":
    """Return the mode; ValueError for a wrong one, and where --chat is another one."""
    from trimaran.runtime.infer.modes import ANSWER, mode_of

    chosen = mode_of(mode or ("answer" if chat else "continue"), to)
    if chat and chosen != ANSWER:
        raise ValueError(f"--chat is --mode answer, and the mode is {chosen.name}; leave one of them out")
    return chosen


def _read_prompts(
    prompt: str | None, prompts: Path | None, file: Path | None, mode: "Mode", system: str | None
) -> "list[Prompt]":
    """Return the prompts to continue; ValueError for options that exclude each other."""
    from trimaran.runtime.infer.prompts import Prompt, conversation, read_prompts

    if prompt is not None and prompts is not None:
        raise ValueError("give either --prompt or --prompts, not both")
    if file is not None and (prompt is not None or prompts is not None or not mode.is_by_passages):
        raise ValueError("--file is for --mode translate or summarize, without --prompt and --prompts")
    if system is not None and mode.name == "continue":
        raise ValueError("--system is for --chat and the modes: give --chat too, or put the text into the prompt")
    if mode.name != "continue" and prompt is None and prompts is None and file is None:
        which = "--chat needs a question" if mode.name == "answer" else f"--mode {mode.name} needs a text"
        raise ValueError(f"{which}: give --prompt or --prompts" + (" or --file" if mode.is_by_passages else ""))
    if file is not None:
        return [Prompt(_text_of(file))]
    inputs = (
        read_prompts(prompts, say) if prompts is not None else [Prompt(_DEFAULT_PROMPT if prompt is None else prompt)]
    )
    return [
        conversation(each.text, system, each.name)
        if mode.name == "answer" and each.messages is None and each.text is not None
        else each
        for each in inputs
    ]


def _text_of(file: Path) -> str:
    """Return the text of a file; ValueError where it has none."""
    try:
        text = read_text(file, _MOST_BYTES).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start:,}; convert it to UTF-8") from error
    if not text.strip():
        raise ValueError(f"{file} has no text")
    return text


def _generate(
    checkpoint: Path,
    inputs: "list[Prompt]",
    sampling: SamplingParams,
    stop_strings: list[str],
    stop_tokens: list[str],
    *,
    batch_size: int,
    as_json: bool,
    tp: int,
    pp: int,
) -> None:
    """Write the task, and run it in this process or on tp * pp ranks."""
    from trimaran.launchers.local.generate import Prompts, write_generate_task
    from trimaran.launchers.worker.run import run_alone

    asked = Prompts(inputs, sampling, stop_strings, stop_tokens, batch_size)
    with scratch_folder("generate") as folder:
        task = write_generate_task(folder, checkpoint, asked, as_json=as_json, tp=tp, pp=pp)
        try:
            if tp * pp == 1:
                run_alone(task)
            else:
                launch_folder(folder)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
        except (Stopped, LaunchError) as ended:
            _end_quietly_without_reader(ended)
            raise


def _end_quietly_without_reader(ended: Stopped | LaunchError) -> None:
    """Exit as programs do whose reader, such as `head`, has read enough; return if the command ended otherwise."""
    code = ended.exit_code if isinstance(ended, LaunchError) else exit_code_after(ended.signal_number)
    if code != exit_code_after(signal.SIGPIPE):
        return
    discard_output()
    raise typer.Exit(code)
