"""`trimaran serve`. Imports no torch."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.common.console import Pp, RunPath, ToLanguage, Tp, errors_as_sentences, path
from trimaran.launchers.run_folder import find_checkpoint
from trimaran.launchers.terminal import say

_INSTALL = "trimaran serve needs the package {}: pip install 'trimaran[serve]'"


def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="Address to listen at; all but this machine's own need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one, which is told.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; that of its folder unless told.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(parser=path, help="File of the API keys that requests must have, one a line.")
    ] = None,
    allow_host: Annotated[
        list[str], typer.Option("--allow-host", help="Another name of this server, such as a proxy's; may be repeated.")
    ] = [],  # noqa: B006 - typer reads it
    slots: Annotated[int, typer.Option(min=1, help="Texts written at the same time on each dp replica.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that wait beyond them; more are refused (429).")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Longest request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one answer may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running answers have at SIGTERM.")] = 60.0,
    mode: Annotated[
        str,
        typer.Option(metavar="MODE", help="Of a chat's text: answer, continue, translate or summarize it."),
    ] = "answer",
    to: ToLanguage = None,
    no_retrieval: Annotated[
        bool, typer.Option("--no-retrieval", help="Of a twin: show the weights alone, without its library.")
    ] = False,
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas of the model, which share the requests.")] = 1,
) -> None:
    """Serve a model over OpenAI's API and a page, straight from a training checkpoint, at any layout."""
    with errors_as_sentences():
        try:
            from trimaran.launchers.serve.app import ServeOptions
            from trimaran.launchers.serve.http.limits import Limits
            from trimaran.launchers.serve.http.security import Guard, is_loopback, read_keys
            from trimaran.launchers.serve.http.server import listen
            from trimaran.launchers.serve.ranks import RankBackend
            from trimaran.launchers.serve.run import Serving, serve_run
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package == "trimaran":
                raise
            raise ValueError(_INSTALL.format(package)) from None
        from trimaran.runtime.infer.modes import mode_of
        from trimaran.runtime.infer.prompts import RunText
        from trimaran.runtime.twin.asking import Twin

        chosen = mode_of(mode, to)
        keys = read_keys(api_key_file) if api_key_file is not None else ()
        if not keys and not is_loopback(host):
            raise ValueError(
                f"--host {host} can be reached from other machines, so requests must have a key: write one into a "
                "file and give it as --api-key-file, or listen at 127.0.0.1"
            )
        checkpoint = find_checkpoint(run)
        folder = checkpoint.parent.parent
        text = RunText.open(folder)
        options = ServeOptions(
            name if name is not None else folder.resolve().name,
            Limits(max_queue=max_queue, body_bytes=max_body_bytes, request_s=timeout, drain_s=drain),
            Guard.make(host, allow_host, keys),
            chosen,
            None if no_retrieval else Twin.find(folder),
        )
        with listen(host, port) as listener:
            say(f"starting {options.name} from {checkpoint}")
            start = lambda: RankBackend.start(checkpoint, tp=tp, pp=pp, dp=dp, slots=slots)
            asyncio.run(serve_run(Serving(text, options, listener), start))
