"""Timing what is done again and again: medians and spread, by the wall clock and by processor time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

_SHORTEST_S: Final = 1e-3  # of one repeat: shorter work is done several times in it
_FEWEST, _MOST = 3, 100


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats, in seconds of one call; see `record.Point`."""

    seconds: float
    cpu_seconds: float
    spread: float
    repeats: int


def time_for(work: Callable[[], object], device: torch.device, budget_s: float) -> Timing:
    """Time `work` for about `budget_s`, at least three times, after two that do not count."""
    work()
    once = _seconds(work, device, 1)[0]
    calls = max(1, int(_SHORTEST_S / max(once, 1e-7)))
    repeats = int(np.clip(budget_s / max(once * calls, 1e-6), _FEWEST, _MOST))
    return _timed(work, device, repeats, calls)


def time_repeats(work: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """Time `repeats` calls after one that does not count: as many on every rank, where the ranks must meet in each."""
    work()
    return _timed(work, device, repeats, 1)


def _timed(work: Callable[[], object], device: torch.device, repeats: int, calls: int) -> Timing:
    found = np.array([_seconds(work, device, calls) for _ in range(repeats)]) / calls
    wall, cpu = np.median(found, axis=0)
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    counted = np.minimum(found[:, 0], found[:, 1]) if is_alone else found[:, 0]
    low, middle, high = np.quantile(counted, (0.25, 0.5, 0.75))
    cpu = float(cpu) if device.type == "cpu" else 0.0
    return Timing(float(wall), cpu, float((high - low) / 2 / middle), repeats)


def _seconds(work: Callable[[], object], device: torch.device, calls: int) -> tuple[float, float]:
    _wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    _wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
