"""The run that several files look at."""

import shutil

import pytest

from tests.launchers.runs import Outcome, Workplace, make_workplace
from tests.session import made_once, session_folder

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
