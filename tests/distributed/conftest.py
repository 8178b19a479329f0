"""The rank pool of a test session."""

import pytest

pytest.register_assert_rewrite("tests.distributed.parity")  # its asserts show their values, as those of test files do

from tests.distributed.ranks import RankPool, session_pool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Rank processes that all tests of this session or worker share: ``ranks.run(function, world_size, *args)``."""
    return session_pool()
