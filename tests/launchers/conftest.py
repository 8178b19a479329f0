"""The run that several files look at, and the browser that opens pages."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.launchers.runs import Outcome, Workplace, make_workplace
from tests.session import made_once, session_folder

if TYPE_CHECKING:
    from tests.launchers.serve.page.visit import Browser

SECTIONS = {"parallel": {"tp": 2, "pp": 2}, "train": {"num_steps": 24, "eval_interval": 8}}
"""Of that run's spec."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Outcome]:
    """A run on 4 ranks, tp 2 x pp 2, that went through without a stop: this worker's copy."""
    workplace, outcome = made_once(finished_run)
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(workplace.folder, folder, dirs_exist_ok=True)
    return Workplace(folder), outcome


def finished_run() -> tuple[Workplace, Outcome]:
    workplace = make_workplace(session_folder() / "finished", **SECTIONS)
    return workplace, workplace.train()


@pytest.fixture(scope="session")
def browser_thread() -> Iterator[ThreadPoolExecutor]:
    """The thread that the browser and its tests run in."""
    with ThreadPoolExecutor(1, "browser") as thread:
        yield thread


@pytest.fixture(scope="session")
def browser(browser_thread: ThreadPoolExecutor) -> "Iterator[Browser]":
    """Debian's Chromium, started once."""
    from tests.launchers.serve.page.visit import CHROMIUM, start_browser  # playwright

    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    browser = browser_thread.submit(start_browser).result()
    yield browser
    browser_thread.submit(browser.close).result()
