"""In which order and on which worker tests run: by the seconds that they took when they were last recorded.

tests/durations.json holds the seconds of every test function that took long enough to matter. A file is one unit of
work, or several where it takes long. Files of which nothing is recorded start first, for they may take long, and then
the longest units, so that the workers of xdist end together.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

RECORD = Path(__file__).with_name("durations.json")
SHORTEST_RECORDED_S = 0.05
LONGEST_UNIT_S = 15.0
SLOW_S = 1.5
"""`make quick` leaves out the tests of a function that takes longer."""
WHOLE_FILES = (
    "tests/benchmarks/test_kernels.py",  # one process in the interpreter
    "tests/launchers/test_interrupt.py",  # one history of stopped runs
    "tests/launchers/test_slurm.py",  # one cluster a file
    "tests/launchers/test_slurm_commands.py",
    "tests/runtime/huggingface/test_import_gguf.py",  # one import of a real model
)
_UNKNOWN_S = 0.02


def recorded_seconds() -> dict[str, float]:
    """Return the seconds of test functions, by node id without parameters: set-up, call and teardown of all cases."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else {}


def function_of(node_id: str) -> str:
    """Return a test's node id without its parameters."""
    return node_id.partition("[")[0]


def seconds_by_test(node_ids: Sequence[str], recorded: Mapping[str, float]) -> dict[str, float]:
    """Return what each test is expected to take: its function's recorded seconds, shared by the function's cases."""
    cases: dict[str, int] = {}
    for node_id in node_ids:
        cases[function_of(node_id)] = cases.get(function_of(node_id), 0) + 1
    return {
        node_id: recorded.get(function_of(node_id), _UNKNOWN_S) / cases[function_of(node_id)] for node_id in node_ids
    }


def units_of_work(node_ids: Sequence[str], recorded: Mapping[str, float]) -> list[list[str]]:
    """Return the tests in units, which hold neighbours of one file, for they share its fixtures.

    Unknown files come first, then the longest units.
    """
    expected = seconds_by_test(node_ids, recorded)
    known = {function.partition("::")[0] for function in recorded}
    files: dict[str, list[str]] = {}
    for node_id in node_ids:
        files.setdefault(node_id.partition("::")[0], []).append(node_id)
    units = []
    for file, tests in files.items():
        unit: list[str] = []
        for test in tests:
            full = sum(expected[each] for each in unit) + expected[test] > LONGEST_UNIT_S
            if unit and full and file not in WHOLE_FILES:
                units.append(unit)
                unit = []
            unit.append(test)
        units.append(unit)
    return sorted(units, key=lambda unit: (unit[0].partition("::")[0] in known, -sum(expected[each] for each in unit)))


class ByDuration(LoadScopeScheduling):
    """xdist's scheduler of groups of tests: the groups are `units_of_work`, and the longest that waits comes next."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        self._unit: dict[str, str] = {}
        self._order: dict[str, int] = {}

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Note which unit each collected test belongs to; a unit has the name of its first test."""
        if not self._unit:
            units = units_of_work(collection, recorded_seconds())
            self._unit = {test: unit[0] for unit in units for test in unit}
            self._order = {unit[0]: number for number, unit in enumerate(units)}
        super().add_node_collection(node, collection)

    def _split_scope(self, nodeid: str) -> str:
        return self._unit[nodeid]

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(min(self.workqueue, key=self._order.__getitem__), last=False)
        super()._assign_work_unit(node)
