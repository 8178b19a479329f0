"""`trimaran report`: write a run's report anew."""

from trimaran.launchers.cli.console import RunPath, errors_as_sentences, require_run
from trimaran.launchers.data.prepare_run import write_report_of
from trimaran.launchers.terminal import say


def report(run: RunPath) -> None:
    """Write RUN/report.html anew from the run's files."""
    with errors_as_sentences():
        require_run(run)
        write_report_of(run)
        say(f"report: {run / 'report.html'}")
