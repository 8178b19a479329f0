"""The run that several files look at."""

import pytest

from tests.launchers.runs import Outcome, Workplace, make_workplace


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Outcome]:
    """A run on 4 ranks, tp 2 x pp 2, that went through without a stop."""
    workplace = make_workplace(tmp_path_factory.mktemp("finished"), parallel={"tp": 2, "pp": 2})
    return workplace, workplace.train()
