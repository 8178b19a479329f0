"""`trimaran twin`: its commands and their options. Imports no torch by itself."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from trimaran.launchers.cli.console import Overrides, errors_as_sentences, path


class _WithSources(TyperGroup):
    """Takes what is no command of the group for the sources of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command before sources; typer calls this."""
        if args and args[0] not in self.commands and args[0] != "--help":
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                ctx.fail(f"No such command, file or folder {args[0]!r}; did you mean {near[0]}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


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
Author = Annotated[str | None, typer.Option(help="Name of the author.")]
Character = Annotated[str | None, typer.Option(help="Whose voice it is: one who speaks in the texts.")]
Model = Annotated[
    Path | None,
    typer.Option(parser=path, metavar="RUN", help="Run of the model that is tuned; without it, one from scratch."),
]
Output = Annotated[Path | None, typer.Option(parser=path, metavar="RUN", help="Run folder of the twin.")]
Language = Annotated[str | None, typer.Option(help="Language of the texts, such as en or tr; found by default.")]
Method = Annotated[
    Literal["adapter", "scratch"] | None, typer.Option(help="How it is trained; by default as the texts ask for.")
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the examples; 2 of an adapter, 4 from scratch.")]


@twin.command(hidden=True)
def run(
    context: typer.Context,
    sources: Sources,
    author: Author = None,
    character: Character = None,
    model: Model = None,
    output: Output = None,
    language: Language = None,
    method: Method = None,
    epochs: Epochs = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
) -> None:
    """Build a twin and train it; the same command goes on where it was interrupted."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.steps import build_step, request_of, spec_of_training

        options = _options(author, character, model, output, language, method, epochs)
        request = request_of(sources, options)
        build_step(request)
        spec = spec_of_training(Path(request.output))
    changes = [f"{name}={json.dumps(value)}" for name, value in request.set.items()]
    _train(context, spec, [*changes, *overrides])


@twin.command()
def build(
    sources: Sources,
    author: Author = None,
    character: Character = None,
    model: Model = None,
    output: Output = None,
    language: Language = None,
    method: Method = None,
    epochs: Epochs = None,
) -> None:
    """Read an author's texts and write a twin's folder: passages, index and examples; train nothing yet."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.steps import build_step, request_of

        build_step(request_of(sources, _options(author, character, model, output, language, method, epochs)))


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
def ask(
    run: Run,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What the twin is asked.")],
    no_retrieval: Annotated[
        bool, typer.Option("--no-retrieval", help="Let the weights alone answer, without the texts.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability; 1 for all.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Another seed, another answer.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to run at.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree to run at.")] = 1,
) -> None:
    """Ask a twin one question; its sources follow the answer."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.asking import ask_step
        from trimaran.runtime.infer.sampling_params import SamplingParams

        sampling = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed, context="stop")
        ask_step(run, question, sampling, retrieval=not no_retrieval, tp=tp, pp=pp)


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
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to run at.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree to run at.")] = 1,
) -> None:
    """Measure a twin beside its base, with and without its texts; write twin/report.json and twin/report.html."""
    with errors_as_sentences():
        from trimaran.launchers.cli.twin.asking import report_step
        from trimaran.launchers.twin.report import Wish

        report_step(run, Wish(tuple(others), questions, answer_tokens, prefixes, characters, seed), tp=tp, pp=pp)


def _train(context: typer.Context, spec: Path, overrides: Sequence[str]) -> None:
    """Run the ordinary `trimaran train`, found by its name: every rule of that command holds here too."""
    root = context.find_root()
    command = root.command.get_command(root, "train")  # type: ignore[attr-defined]  # the app is a group
    words = [str(spec), *(word for change in overrides for word in ("--set", change))]
    raise typer.Exit(command.main(words, prog_name="trimaran train", standalone_mode=False) or 0)


def _options(
    author: str | None,
    character: str | None,
    model: Path | None,
    output: Path | None,
    language: str | None,
    method: str | None,
    epochs: float | None,
) -> dict[str, object]:
    """Return the options that were given, by the names of a request's fields."""
    given: dict[str, object] = {
        "author": author,
        "character": character,
        "model": None if model is None else str(model),
        "output": None if output is None else str(output),
        "language": language,
        "method": method,
        "epochs": epochs,
    }
    return {name: value for name, value in given.items() if value is not None}
