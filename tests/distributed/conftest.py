"""The rank pool of a test session."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes shared by all tests of this pytest (or xdist worker) session: ``ranks.run(function, world_size, *args)``."""
    pool = RankPool()
    yield pool
    pool.close()
