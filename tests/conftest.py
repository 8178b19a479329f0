"""Rules for every test session: which worker runs what, what is counted, and what a skipped test means in CI."""

import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from tests import counting
from tests.durations import Durations
from tests.scheduling import SLOW_S, ByDuration, function_of, recorded_seconds

# NumPy's threads, for the reason that torch has one below; it reads this when it is imported, which is later.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
MISSING_GPU = re.compile(r"\b(GPU|CUDA)\b", re.IGNORECASE)
COLLECTION_SKIPS: pytest.StashKey[dict[str, str]] = pytest.StashKey()
# How long an example takes, to run or to make, says how busy the machine is.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")
DURATIONS: pytest.StashKey[Durations] = pytest.StashKey()
STARTED: pytest.StashKey[float] = pytest.StashKey()
OWN_FOLDER: pytest.StashKey[Path] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the reasons of test files that are skipped whole, for durations, and for what is counted."""
    config.stash[COLLECTION_SKIPS] = {}
    config.stash[DURATIONS] = Durations()
    config.stash[STARTED] = time.monotonic()
    if (
        not is_worker(config) and counting.FOLDER not in os.environ
    ):  # a session inside a session counts for the outer one
        config.stash[OWN_FOLDER] = Path(tempfile.mkdtemp(prefix="trimaran-session-"))
        os.environ[counting.FOLDER] = str(config.stash[OWN_FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the session's processes shared."""
    folder = config.stash.get(OWN_FOLDER, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop(counting.FOLDER, None)


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is a worker of xdist."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByDuration:
    """Give the workers the longest tests first."""
    return ByDuration(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of functions that took long when they were last recorded: `make quick` leaves them out."""
    recorded = recorded_seconds()
    for item in items:
        if recorded.get(function_of(item.nodeid), 0.0) > SLOW_S:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Give torch one thread: workers and ranks share the cores, and an idle second thread spins on one."""
    torch = sys.modules.get("torch")  # a session that collected no test of torch need not import it
    if torch is not None:
        torch.set_num_threads(1)


class Watch:
    """Keeps every test's duration, and the reasons of test files that are skipped whole (`importorskip`).

    Workers of xdist do not report such a file on their own.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._skips = config.stash[COLLECTION_SKIPS]
        self._durations = config.stash[DURATIONS]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase of a test to its function's seconds."""
        self._durations.add(report.nodeid, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a skipped file."""
        if report.skipped:
            self._skips[report.nodeid] = skip_reason(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """On the controller: take over what a worker noted."""
        self._skips.update(getattr(node, "workeroutput", {}).get("collection_skips", {}))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Watch tests and their collection, in this process and in the workers."""
    session.config.pluginmanager.register(Watch(session.config))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's notes to the controller; there, judge the session by what it skipped and counted."""
    config = session.config
    if is_worker(config):
        config.workeroutput["collection_skips"] = config.stash[COLLECTION_SKIPS]  # type: ignore[attr-defined]
        return
    if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return
    skipped = os.environ.get("CI") == "true" and unexcused(all_skips(config))
    if skipped or counting.over_bounds(counts()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif OWN_FOLDER in config.stash:
        config.stash[DURATIONS].leave()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the session took and counted, and list every skipped test with its reason."""
    if terminalreporter.verbosity >= 0:
        report_cost(terminalreporter, time.monotonic() - config.stash[STARTED])
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


def report_cost(terminalreporter: pytest.TerminalReporter, wall_s: float) -> None:
    """Print seconds of the clock and of the processors, and what tests/counting.py bounds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    terminalreporter.section("cost")
    terminalreporter.line(f"{wall_s:.0f} s, {cpu_s:.0f} s of CPU time in processes that have ended")
    found = counts()
    for kind, details in sorted(found.items()):
        terminalreporter.line(f"{kind}: {details.total()} of at most {counting.BOUNDS.get(kind)}")
    for sentence in counting.over_bounds(found):
        terminalreporter.line(sentence, red=True)


def counts() -> dict[str, Any]:
    """Return what the session's processes have counted."""
    return counting.recorded(Path(os.environ[counting.FOLDER]))


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


class OurModules:
    """Where our modules stand in `sys.modules` and in their packages, which each test leaves as it was."""

    def __init__(self) -> None:
        self._count, self._places = 0, list[tuple[str, ModuleType, dict[str, Any], str, Any]]()

    def torn(self) -> set[str]:
        """Return the names of modules that their package does not know, or of which it knows another one.

        It is called after each of some thousand tests, most of which import nothing: that is seen without a search.
        """
        if len(sys.modules) == self._count and all(
            sys.modules.get(name) is module and package.get(last) is known
            for name, module, package, last, known in self._places
        ):
            return set()
        self._count, self._places, found = len(sys.modules), [], set()
        for name, module in list(sys.modules.items()):
            if name.startswith("trimaran."):
                package, _, last = name.rpartition(".")
                names = vars(sys.modules[package]) if package in sys.modules else {}
                known = names.get(last)  # may be a function of the module's name
                self._places.append((name, module, names, last, known))
                if known is None or (isinstance(known, ModuleType) and known is not module):
                    found.add(name)
        self._count = 0 if found else self._count
        return found


@pytest.fixture(scope="session")
def our_modules() -> OurModules:
    """What is known of the modules of this process."""
    return OurModules()


@pytest.fixture(autouse=True)
def modules_as_they_were(our_modules: OurModules) -> Iterator[None]:
    """Fail a test that imports a module of ours anew and does not put it back: later tests would find two of it."""
    yield
    assert not our_modules.torn(), "imported anew and not put back"
