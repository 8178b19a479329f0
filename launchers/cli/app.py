"""The command line. Nothing here imports torch before the spec is valid."""

import sys
from signal import SIGINT

import typer

from trimaran.launchers.cli.chat import chat
from trimaran.launchers.cli.convert import export, import_
from trimaran.launchers.cli.evaluate import evaluate
from trimaran.launchers.cli.generate import generate
from trimaran.launchers.cli.jobs import cancel, logs, status
from trimaran.launchers.cli.planning.calibrate import calibrate
from trimaran.launchers.cli.planning.check import check, schema
from trimaran.launchers.cli.planning.mup_check import coordinate_check
from trimaran.launchers.cli.planning.plan import plan
from trimaran.launchers.cli.planning.presets import models
from trimaran.launchers.cli.planning.scaling import scaling
from trimaran.launchers.cli.planning.schedules import schedules
from trimaran.launchers.cli.prepare import data, prepare
from trimaran.launchers.cli.report import report
from trimaran.launchers.cli.score import score
from trimaran.launchers.cli.serve import serve
from trimaran.launchers.cli.train import train
from trimaran.launchers.cli.tune import tune
from trimaran.launchers.cli.twin.app import twin
from trimaran.launchers.env.exit_codes import exit_code_after

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(generate)
app.command()(chat)
app.command()(evaluate)
app.command()(score)
app.command()(serve)
app.command()(models)
app.command()(coordinate_check)
app.command()(status)
app.command()(logs)
app.command()(cancel)
app.command("import")(import_)
app.command()(export)
app.command()(prepare)
app.add_typer(data, name="data")
app.command()(train)
app.add_typer(tune, name="tune")
app.add_typer(twin, name="twin")
app.command()(check)
app.command()(plan)
app.command()(calibrate)
app.add_typer(scaling, name="scaling")
app.command()(schedules)
app.command()(schema)
app.command()(report)


def main() -> None:
    """Run the `trimaran` command."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun, which would tell of it
        sys.exit(exit_code_after(SIGINT))


if __name__ == "__main__":
    main()
