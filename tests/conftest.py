"""Rules for every test session: the order of tests, and what a skipped test means in CI."""

import os
import re
from typing import Any

import pytest

MISSING_GPU = re.compile(r"\b(GPU|CUDA)\b", re.IGNORECASE)
COLLECTION_SKIPS: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the reasons of test files that are skipped whole."""
    config.stash[COLLECTION_SKIPS] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests first, so that no xdist worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class CollectionSkips:
    """Keeps the reasons of test files that are skipped whole (`importorskip`): xdist workers do not report them on their own."""

    def __init__(self, config: pytest.Config) -> None:
        self._skips = config.stash[COLLECTION_SKIPS]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a skipped file."""
        if report.skipped:
            self._skips[report.nodeid] = skip_reason(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """On the controller: take over what a worker noted."""
        self._skips.update(getattr(node, "workeroutput", {}).get("collection_skips", {}))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Watch the collection, in this process and in the workers."""
    session.config.pluginmanager.register(CollectionSkips(session.config))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's notes to the controller; there, fail a session in CI that skipped a test for want of anything but a GPU."""
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:
        worker_output["collection_skips"] = session.config.stash[COLLECTION_SKIPS]
        return
    passing = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passing and os.environ.get("CI") == "true" and unexcused(all_skips(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Count and list every skipped test with its reason."""
    skips = all_skips(config)
    if not skips:
        return
    refused = unexcused(skips) if os.environ.get("CI") == "true" else {}
    terminalreporter.section(f"{len(skips)} skipped")
    for where, reason in sorted(skips.items()):
        terminalreporter.line(f"{'NOT ALLOWED IN CI ' if where in refused else ''}{where}: {reason}")
    if refused:
        terminalreporter.line(
            f"{len(refused)} skips do not name a missing GPU or CUDA: in CI they fail the session", red=True
        )


def all_skips(config: pytest.Config) -> dict[str, str]:
    """Return the reason of every skipped test and test file, by node id."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    tests = {report.nodeid: skip_reason(report) for report in reporter.stats.get("skipped", [])} if reporter else {}
    return tests | config.stash[COLLECTION_SKIPS]


def unexcused(skips: dict[str, str]) -> dict[str, str]:
    """Return the skips whose reason is something else than a missing GPU."""
    return {where: reason for where, reason in skips.items() if not MISSING_GPU.search(reason)}


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test or file was skipped, in one line."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(reason.removeprefix("Skipped: ").split())
