"""The suite itself: its table names every file and promise, its units of work lose no test, and its counts add up."""

import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests import counting
from tests.conftest import OurModules
from tests.durations import PAGE, ROOT, Durations, files_of_tests, merged, page_with, promise, table
from tests.launchers.forked import Forked, fork_server
from tests.scheduling import LONGEST_UNIT_S, WHOLE_FILES, recorded_seconds, seconds_by_test, units_of_work


def test_the_table_names_every_test_file_with_its_promise() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [
        file for file in files_of_tests() if f"| {promise(file)} | [" not in page or f"]({name(file)}) |" not in page
    ]
    assert not missing, f"run `python -m tests.durations`: {missing} not in tests/README.md as their docstrings say"
    assert page.count("](") == len(files_of_tests()), (
        "the table names a file that is gone: run `python -m tests.durations`"
    )


def name(file: Path) -> str:
    return file.relative_to(ROOT / "tests").as_posix()


def test_a_module_that_is_not_put_back_is_found(our_modules: OurModules) -> None:
    """After a test that has imported it anew, or has left another one in its package."""
    name, package = "trimaran.runtime.grid", importlib.import_module("trimaran.runtime")
    importlib.import_module(name)
    for place, key in ((sys.modules, name), (vars(package), "grid")):
        assert our_modules.torn() == set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(place, key, ModuleType(name))
            assert our_modules.torn() == {name}
    assert our_modules.torn() == set()


def test_every_test_file_states_its_promise() -> None:
    assert not [file for file in files_of_tests() if len(promise(file)) < 20]


def test_writing_the_table_again_changes_nothing_else() -> None:
    once = page_with(table(recorded_seconds()))
    assert once.count("| promise | test file | seconds |") == 1
    assert once.partition("<!-- table -->")[0] == PAGE.read_text(encoding="utf-8").partition("<!-- table -->")[0]


def test_units_hold_every_test_once_and_the_longest_come_first() -> None:
    tests = [f"tests/test_{file}.py::test_{n}[{case}]" for file in "abc" for n in range(5) for case in range(3)]
    tests += [f"{WHOLE_FILES[0]}::test_{n}" for n in range(3)]
    recorded = {"tests/test_b.py::test_1": 40.0, "tests/test_c.py::test_0": 3.0}
    recorded |= {f"{WHOLE_FILES[0]}::test_{n}": 30.0 for n in range(3)}
    units = units_of_work(tests, recorded)
    assert Counter(test for unit in units for test in unit) == Counter(tests)
    expected = seconds_by_test(tests, recorded)
    lengths = [sum(expected[test] for test in unit) for unit in units]
    assert [test.partition("::")[0] for test in units[0]] == ["tests/test_a.py"] * 15, "nothing is known of it"
    assert lengths[1:] == sorted(lengths[1:], reverse=True)
    assert lengths[1] == pytest.approx(90.0), "a file that must stay whole is one unit"
    assert all(length <= LONGEST_UNIT_S for length in lengths[2:])
    assert all(len({test.partition("::")[0] for test in unit}) == 1 for unit in units)


def test_seconds_of_sessions_of_some_tests_are_merged(tmp_path: Path) -> None:
    suite = "tests/test_suite.py::test_every_test_file_states_its_promise"
    house, gone = "tests/test_house.py::test_no_todo_comments", "tests/test_suite.py::test_that_is_gone"
    for seconds in (9.0, 3.0):
        session = Durations()
        session.add(f"{suite}[first]", seconds)
        session.add(f"{suite}[second]", 0.5)
        session.leave(tmp_path / "left" / "durations.json")
    other = Durations()
    other.add(gone, 5.0)
    other.leave(tmp_path / "left" / "durations.json")
    left = json.loads((tmp_path / "left" / "durations.json").read_text())
    assert left == {suite: 3.5, gone: 5.0}
    known = next(iter(recorded_seconds()))
    assert merged({known: 1.0, house: 1.0, suite: 2.0}, left) == {known: 1.0, suite: 3.5}


def test_counts_of_several_processes_add_up_and_are_held_to_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(counting.FOLDER, str(tmp_path))
    monkeypatch.setattr(counting, "BOUNDS", {"cold start": 3})
    counting.record("cold start", "check")
    (tmp_path / "other.jsonl").write_text('{"kind": "cold start", "detail": "train", "count": 2}\n')
    assert counting.recorded(tmp_path)["cold start"] == {"check": 1, "train": 2}
    assert not counting.over_bounds(counting.recorded(tmp_path))
    counting.record("cold start", "check")
    assert counting.over_bounds(counting.recorded(tmp_path)) == [
        "4 of cold start, over 3 (tests/counting.py): check 2, train 2"
    ]


def test_a_forked_command_that_nobody_waits_for_does_not_disturb_the_next(tmp_path: Path) -> None:
    fork_server()
    with Path(os.devnull).open() as nothing:
        descriptors = dict.fromkeys((0, 1, 2), nothing.fileno())
        first = Forked(["-c", "pass"], tmp_path, descriptors, dict(os.environ))
        while Path(f"/proc/{first.pid}").exists():
            time.sleep(0.01)
        assert Forked(["-c", "pass"], tmp_path, descriptors, dict(os.environ)).wait(60) == 0
        assert first.wait(60) == 0
