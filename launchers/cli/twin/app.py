"""`trimaran twin`: its commands and their options. Imports no torch by itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.common.console import NoRetrieval, Overrides, Pp, Tp, errors_as_sentences, path
from trimaran.launchers.cli.common.default_command import RunByDefault
from trimaran.launchers.cli.common.option_records import SamplingOptions, TwinOptions, option_records

_NONE_GIVEN = TwinOptions()
_SAMPLING = SamplingOptions(200, top_k=0, top_p=0.95)


class _WithSources(RunByDefault):
    takes = "command, file or folder"


twin = typer.Typer(
    cls=_WithSources,
    no_args_is_help=True,
    help="An author's twin: `trimaran twin SOURCES... --author NAME --model RUN --output RUN` builds and trains it.",
)
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCES...",
        help="Files and folders of texts (.txt, .md, .html, .epub, .pdf), package:NAME/PATH, or one YAML file of all "
        "the options.",
    ),
]


@twin.command(hidden=True)
@option_records
def run(
    context: typer.Context,
    sources: Sources,
    options: TwinOptions = _NONE_GIVEN,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
) -> None:
    """Build a twin and train it; the same command goes on where it was interrupted."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.steps import build_step, request_of, spec_of_training

        request = request_of(sources, options.given())
        build_step(request)
        spec = spec_of_training(Path(request.output))
    changes = [f"{name}={json.dumps(value)}" for name, value in request.set.items()]
    _train(context, spec, [*changes, *overrides])


@twin.command()
@option_records
def build(
    sources: Sources,
    options: TwinOptions = _NONE_GIVEN,
) -> None:
    """Read an author's texts and write a twin's folder: passages, index and examples; train nothing yet."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.steps import build_step, request_of

        build_step(request_of(sources, options.given()))


Run = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="The --output of a twin that is built.")]


@twin.command()
def train(
    context: typer.Context,
    run: Run,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train a twin that is built; goes on where it was interrupted."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.steps import spec_of_training

        spec = spec_of_training(run)
    _train(context, spec, overrides)


@twin.command()
@option_records
def ask(
    run: Run,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What the twin is asked.")],
    no_retrieval: NoRetrieval = False,
    sampling: SamplingOptions = _SAMPLING,
    tp: Tp = 1,
    pp: Pp = 1,
) -> None:
    """Ask a twin one question; its sources follow the answer."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.asking import ask_step

        ask_step(run, question, sampling.params(), retrieval=not no_retrieval, tp=tp, pp=pp)


@twin.command()
def report(
    run: Run,
    others: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Files and folders of texts of others, beside whom the style is told; may be repeated. By default "
            "Python's documentation, for texts in English.",
        ),
    ] = [],  # noqa: B006
    questions: Annotated[int, typer.Option(min=2, help="That each way of answering is measured on.")] = 24,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 120,
    prefixes: Annotated[
        int, typer.Option(min=1, help="Of passages, whose continuation is looked at for copies.")
    ] = 200,
    characters: Annotated[
        int, typer.Option(min=1, help="Of held-out text that every checkpoint is scored on.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other answers.")] = 0,
    tp: Tp = 1,
    pp: Pp = 1,
) -> None:
    """Measure a twin beside its base, with and without its texts; write twin/report.json and twin/report.html."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.asking import report_step
        from trimaran.launchers.twin.report import Wish

        report_step(run, Wish(tuple(others), questions, answer_tokens, prefixes, characters, seed), tp=tp, pp=pp)


def _train(context: typer.Context, spec: Path, overrides: Sequence[str]) -> None:
    """Run the ordinary `trimaran train`, found by its name: every rule of that command holds here too."""
    root = context.find_root()
    _, command, _ = root.command.resolve_command(root, ["train"])  # type: ignore[attr-defined]  # the app is a group
    words = [str(spec), *(word for change in overrides for word in ("--set", change))]
    raise typer.Exit(command.main(words, prog_name="trimaran train", standalone_mode=False) or 0)
