"""The command line: all commands, by what they are for. The module of one is imported when it is called."""

import os
import sys
from importlib import import_module
from signal import SIGINT
from typing import Annotated, Any, Final, Literal

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from trimaran.launchers.cli.common.one_screen import shorten_help

_HERE: Final = "trimaran.launchers.cli"
# Panel of `trimaran --help` -> command -> (its module and function or group, what it does in one line).
COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Run": {
        "train": ("train:train", "Train the run of a spec; resumes by itself."),
        "check": ("planning.check:check", "Understand a run before it starts."),
        "fields": ("fields:fields", "Every field of a spec: type, default, rule."),
        "schema": ("planning.check:schema", "Print the JSON schema of a spec, for editors."),
        "doctor": ("doctor:doctor", "What this machine has, and what that changes."),
        "report": ("report:report", "Write the report of a run anew."),
    },
    "Data": {
        "prepare": ("prepare:prepare", "Text to token shards: clean, filter, tokenize."),
        "data": ("prepare:data", "What a recipe has kept and removed."),
        "twin": ("twin.app:twin", "An author's twin: gather texts, train, report."),
    },
    "After training": {
        "generate": ("generate:generate", "Continue prompts from a checkpoint."),
        "chat": ("chat:chat", "Talk with a model in the terminal."),
        "serve": ("serve:serve", "Serve a model over OpenAI's API and a page."),
        "evaluate": ("evaluate:evaluate", "Perplexity of texts and scores of tasks."),
        "score": ("score:score", "Score conversations by a reward model."),
    },
    "Plan": {
        "plan": ("planning.plan:plan", "Memory, step time, days, money and energy."),
        "schedules": ("planning.schedules:schedules", "Compare the pipeline schedules that fit a spec."),
        "calibrate": ("planning.calibrate:calibrate", "Measure this machine, for plans by it."),
        "scaling": ("planning.scaling:scaling", "What size and tokens a budget is best spent on."),
        "tune": ("tune:tune", "Search for the best values of fields."),
        "coordinate-check": ("planning.mup_check:coordinate_check", "Whether muP holds as the width grows."),
    },
    "Models": {
        "models": ("planning.presets:models", "The published shapes that model.preset names."),
        "import": ("convert:import_", "Make a run of a Hugging Face model."),
        "export": ("convert:export", "Write a folder that transformers and vLLM load."),
    },
    "Jobs": {
        "status": ("jobs:status", "What a run's batch job does, and how far it is."),
        "logs": ("jobs:logs", "The output of a run's newest job."),
        "cancel": ("jobs:cancel", "End a run's batch job; its ranks save first."),
    },
}


class _Listed(TyperCommand):
    """A command as the list of them shows it."""

    def __init__(self, name: str, where: str, panel: str, summary: str) -> None:
        super().__init__(name, help=summary, rich_help_panel=panel)
        self._where = where

    def load(self) -> Any:
        """Import the command and return it, as typer calls it."""
        module, _, attribute = self._where.partition(":")
        found = getattr(import_module(f"{_HERE}.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(self.name)(function)
        command = shorten_help(get_command(found))
        command.name = self.name
        return command


class _Commands(TyperGroup):
    """The commands of the table; one is imported when it is called, for all of them take half a second."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for panel, commands in COMMANDS.items():
            for name, (where, summary) in commands.items():
                self.add_command(_Listed(name, where, panel, summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that the first argument names, loaded; typer calls this."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Listed) else command, rest


def _print_version(is_given: bool) -> None:
    if is_given:
        from importlib.metadata import version as version_of  # 20 ms, which no other command needs

        typer.echo(f"trimaran {version_of('trimaran')}")
        raise typer.Exit


def _install_completion(shell: str | None) -> None:
    if shell is not None:
        from typer.completion import install  # type: ignore[attr-defined]  # typer imports it there

        from trimaran.launchers.cli.common.console import errors_as_sentences

        with errors_as_sentences():
            _, file = install(shell=shell, prog_name="trimaran")
        typer.echo(f"completion for {shell} is installed in {file}; open a new terminal to use it")
        raise typer.Exit


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def trimaran(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    install_completion: Annotated[
        Literal["bash", "zsh", "fish"] | None,
        typer.Option(callback=_install_completion, is_eager=True, help="Install completion for a shell and exit."),
    ] = None,
) -> None:
    """Train transformer language models over TP x PP x DP ranks, from one YAML file."""


def main() -> None:
    """Run the `trimaran` command."""
    # Looking for plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if "_TRIMARAN_COMPLETE" in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    try:
        app(prog_name="trimaran")
    except KeyboardInterrupt:  # before a command has begun, which would tell of it
        from trimaran.launchers.env.exit_codes import exit_code_after

        sys.exit(exit_code_after(SIGINT))


if __name__ == "__main__":
    main()
