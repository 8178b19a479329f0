"""The table of `trimaran plan --published`: its errors are those that the shipped constants make, and the bars hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trimaran.runtime.plan.published.accuracy import group_of, of_16_bits, predicted, published_runs, time_rows
from trimaran.runtime.plan.published.tables import PublishedRun
from trimaran.runtime.plan.published.winners import places_of_winners
from trimaran.runtime.plan.time.calibrations import calibration_for, shipped
from trimaran.runtime.plan.time.fit import Measured, fit

PUBLISHED = Path(__file__).parent / "published"
MISSED = ["left out, by whole models"]  # its median; docs/planner.md


@pytest.fixture(scope="module")
def timed() -> list[PublishedRun]:
    return published_runs(PUBLISHED)[0]


def test_the_bars_hold_but_for_those_that_are_told(timed: list[PublishedRun]) -> None:
    rows = time_rows(timed, shipped())
    assert [row.what for row in rows if not row.holds] == MISSED
    assert sum(row.rows for row in rows[1:3]) == 1152 + 62
    assert rows[0].rows == rows[5].rows == 412
    assert [row.rows for row in rows[-2:]] == [93, 18]


def test_a_winner_ranks_first_where_constants_make_it_fastest(timed: list[PublishedRun]) -> None:
    """With links that cost nothing and a host that costs nothing, tp and pp only lose; so pp 1 and tp 1 come first."""
    run = next(run for run in timed if run.stack == "nanotron" and run.gpus == 8)
    free = replace(
        shipped().default.values(), link=1e3, nic=1e3, link_latency=1e-12, dp_latency=1e-12, host=1e-9, half_depth=1e-6
    )
    alone = replace(run, cases=(replace(run.cases[0], tp=1.0, pp=1.0, dp=8.0, microbatch=1.0),))
    across = replace(run, cases=(replace(run.cases[0], tp=8.0, pp=1.0, dp=1.0, microbatch=1.0),))
    (first, _), (later, _) = places_of_winners([alone, across], free)
    assert first < later


def test_recorded_errors_are_those_of_the_shipped_constants(timed: list[PublishedRun]) -> None:
    for calibration in shipped().calibrations:
        own = [run for run in timed if group_of(run) == (
            calibration.software, calibration.chip, calibration.dtype, calibration.group
        )]  # fmt: skip
        assert len(own) == calibration.runs
        errors = np.abs(predicted(own, shipped()) / [run.seconds for run in own] - 1)
        assert np.median(errors) == pytest.approx(calibration.median, abs=2e-4)
        assert np.quantile(errors, 0.9) == pytest.approx(calibration.p90, abs=2e-4)
        assert calibration.gpus == (min(run.gpus for run in own), max(run.gpus for run in own))


def test_the_shipped_constants_are_what_the_fit_finds(timed: list[PublishedRun]) -> None:
    """One group of the nineteen; benchmarks/plan_constants.py fits them all."""
    own = [run for run in timed if run.stack == "internevo"]
    found = fit(Measured(own), shipped().default.values())
    calibration, _ = calibration_for(shipped(), "internevo", "A100-80GB", "bfloat16")
    assert vars(found) == pytest.approx(calibration.constants, rel=0.02)


def test_gpt_3_takes_34_days(timed: list[PublishedRun]) -> None:
    """300 billion tokens on 1,024 A100 (Narayanan et al. 2021, section 5.1)."""
    run = next(run for run in timed if run.model == "GPT-3 175B")
    seconds = predicted([run], shipped())[0]
    days = 300e9 / (1536 * 2048) * seconds / 86400
    assert days == pytest.approx(34, rel=0.05)


def test_every_16_bit_row_is_counted(timed: list[PublishedRun]) -> None:
    assert len({run.stack for run in of_16_bits(timed)}) == 9


def test_an_unknown_software_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^software 'nemmo' is not known; the nearest is 'nemo', of "):
        calibration_for(shipped(), "nemmo", "H100-SXM", "bfloat16")
