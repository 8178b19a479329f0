"""One self-contained HTML page about a run: ``write_report(run_dir)``."""

from trimaran.launchers.report.page import write_report

__all__ = ["write_report"]
