"""Goodput: intervals by Young and Daly are near the best of a seeded simulation, at the rates that were published."""

import math

import numpy as np
import pytest

from trimaran.runtime.plan.goodput import daly, goodput, mean_time_between_failures, simulated_goodput, young

HOUR = 3600.0


def test_llama_3_s_rate_of_failures() -> None:
    """419 unexpected interruptions in 54 days on 16,384 GPUs: one in 3.1 hours."""
    mtbf = mean_time_between_failures(16_384)
    assert mtbf / HOUR == pytest.approx(54 * 24 / 419, rel=0.01)


def test_young_and_daly_agree_where_a_save_is_short() -> None:
    assert young(60.0, 24 * HOUR) == pytest.approx(math.sqrt(2 * 60 * 24 * HOUR))
    assert daly(60.0, 24 * HOUR) == pytest.approx(young(60.0, 24 * HOUR), rel=0.02)
    assert daly(3 * HOUR, HOUR) == HOUR, "where a save takes longer than two failures are apart"


@pytest.mark.parametrize(("save", "mtbf"), [(60.0, 3 * HOUR), (300.0, 5 * HOUR), (20.0, HOUR)])
def test_no_simulated_interval_is_much_better_than_daly_s(save: float, mtbf: float) -> None:
    best = daly(save, mtbf)
    found = [
        simulated_goodput(best * factor, save, 120.0, mtbf, failures=20_000) for factor in np.geomspace(0.3, 3, 13)
    ]
    assert max(found) - simulated_goodput(best, save, 120.0, mtbf, failures=20_000) < 0.01
    assert found[0] < max(found) > found[-1], "far from it on either side is worse"
    assert goodput(best, save, 120.0, mtbf) == pytest.approx(max(found), abs=0.02)


def test_the_simulation_is_its_seed_s() -> None:
    one, two = (simulated_goodput(600.0, 30.0, 60.0, HOUR, seed=seed) for seed in (1, 2))
    assert one == simulated_goodput(600.0, 30.0, 60.0, HOUR, seed=1) != two


def test_goodput_is_never_below_0() -> None:
    assert goodput(60.0, 120.0, 600.0, 60.0) == 0.0
