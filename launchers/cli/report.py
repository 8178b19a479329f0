"""`trimaran report`: write a run's report anew, or set runs beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.data.prepare_run import write_report_of
from trimaran.launchers.run_folder import require_run
from trimaran.launchers.terminal import say


def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, metavar="RUN...", help="Run folders; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Else RUN/report.html; of a comparison, comparison.html."),
    ] = None,
) -> None:
    """Write RUN/report.html anew from the run's files; of several runs, a page that compares them."""
    with errors_as_sentences():
        for run in runs:
            require_run(run)
        if len(runs) == 1:
            say(f"report: {write_report_of(runs[0], output)}")
        else:
            from trimaran.launchers.report.comparison import write_comparison

            say(f"comparison: {write_comparison(runs, output or Path('comparison.html'))}")
