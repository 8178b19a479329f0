"""The rank pool of a test session."""

import pytest

pytest.register_assert_rewrite("tests.distributed.parity")  # its asserts show their values, as those of test files do

from tests.distributed.ranks import RankPool, session_pool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Rank processes shared by all tests of this session (or xdist worker): ``ranks.run(function, world_size, *args)``."""
    return session_pool()
