"""CPU-seconds of work in this process, for the benchmarks that compare such."""

import time
from collections.abc import Callable
from typing import Any


def least_cpu_seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the least CPU-seconds of a round."""
    taken = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return min(taken)
