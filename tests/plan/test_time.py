"""Step time: closed forms hold, each term does what it is for, and a fit finds constants that made its data."""

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from trimaran.runtime.plan.cases import Case, Cases, even_layers
from trimaran.runtime.plan.published.tables import read_table
from trimaran.runtime.plan.time.constants import DEFAULT, NAMES, SHARES, Constants, from_free, to_free
from trimaran.runtime.plan.time.fit import Measured, fit
from trimaran.runtime.plan.time.step import StepTime, product, step_time

PUBLISHED = Path(__file__).parent / "published"
FAST_HOST = replace(DEFAULT, host=1e-9)
CASE = next(run for run in read_table(PUBLISHED / "runs.csv") if run.model == "GPT-3 175B").cases[0]


def time_of(constants: Constants = FAST_HOST, **changes: float) -> StepTime:
    return step_time(Cases.of([replace(CASE, **changes)]), constants)


def test_the_parts_add_up_to_the_step() -> None:
    runs = read_table(PUBLISHED / "runs.csv")
    found = step_time(Cases.of(case for run in runs for case in run.cases), DEFAULT)
    np.testing.assert_allclose(sum(found.parts.values()), found.total, rtol=1e-12)
    for name, seconds in found.parts.items():
        assert seconds.min() > (-1e-9 if name != "bubble" else -np.inf)


@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_the_bubble_of_even_stages_is_p_minus_1_over_v_m(virtual: int) -> None:
    """Narayanan et al. 2021, section 2.2, of a model whose head and transfers cost nothing."""
    found = time_of(vocab=1, virtual_stages=virtual, pp=16, batch=64 * 8, nic_rate=1e30, link_rate=1e30)
    pipelined = float(found.total[0] - found.tail[0])
    ideal = float(found.layer[0]) * 96 / 16 * 64
    latency = float(found.transfer[0]) * (64 + 15 / virtual)
    assert pipelined - latency == pytest.approx(ideal * (1 + 15 / (virtual * 64)), rel=1e-2)


def test_a_width_off_a_multiple_of_64_after_the_cut_takes_longer() -> None:
    """BigScience: hidden 14400 at tp 8 took 1.38 times the step of 13824, for 1.08 times the parameters."""
    wide = time_of(hidden=14400, ffn=57600, head_dim=150).layer[0]
    narrow = time_of(hidden=13824, ffn=55296, head_dim=144).layer[0]
    assert 1.25 < wide / narrow < 1.5


def test_a_product_of_one_tile_more_than_a_round_takes_two_rounds() -> None:
    cases = Cases.of([CASE])
    rows, columns, depth = np.array([128.0 * 27]), np.array([128.0 * 4]), np.array([8192.0])
    full, more = (product(cases, DEFAULT, each, columns, depth) for each in (rows, rows + 128))
    assert more[0] / full[0] == pytest.approx(2.0, rel=1e-6)


def test_a_small_model_is_bound_by_the_host() -> None:
    small = {"hidden": 512.0, "ffn": 2048.0, "heads": 8.0, "kv_heads": 8.0, "head_dim": 64.0, "vocab": 512.0, "tp": 1.0}
    slow = replace(DEFAULT, host=1e-3)
    found = time_of(slow, **small, microbatch=1, pp=1, layers=96, most_layers=96, last_layers=96)
    assert found.host_bound[0]
    assert float(found.total[0] - found.tail[0]) == pytest.approx(97 * 4e-3 * CASE.batch / CASE.dp, rel=1e-6)
    assert not time_of(slow).host_bound[0]


@pytest.mark.parametrize(
    "changes", [{"dp": 16.0, "batch": 3072.0}, {"seq": 4096.0}, {"recompute": 1.0}, {"vocab": 1e5}]
)
def test_more_work_takes_longer(changes: dict[str, float]) -> None:
    base = replace(CASE, recompute=0.0)
    one, two = (step_time(Cases.of([case]), FAST_HOST).total[0] for case in (base, replace(base, **changes)))
    assert two > one


def test_even_layers_give_every_layer_once() -> None:
    assert even_layers(30, 4) == [8, 8, 7, 7]
    with pytest.raises(ValueError, match="3 layers can't be shared out over 4 stages"):
        even_layers(3, 4)


def test_free_coordinates_are_inverted() -> None:
    assert np.allclose(astuple(from_free(to_free(DEFAULT))), astuple(DEFAULT))
    assert set(SHARES) <= set(NAMES)
    assert len(NAMES) == 12, "at most twelve"


def test_a_fit_predicts_what_its_constants_made() -> None:
    """Not each constant: some of these runs say nothing of some of them."""
    truth = replace(DEFAULT, gemm=0.62, traffic=1.6, attention=0.33, hidden_dp=0.3)
    runs = [run for run in read_table(PUBLISHED / "runs.csv") if run.stack == "llm-foundry" and run.chip == "A100-80GB"]
    seconds = Measured(runs).predict(truth)
    made = Measured([replace(run, seconds=float(each)) for run, each in zip(runs, seconds, strict=True)])
    before = np.abs(made.log_errors(DEFAULT)).mean()
    assert np.abs(made.log_errors(fit(made))).mean() < min(0.01, before / 5)


def test_a_case_has_a_number_for_every_attribute() -> None:
    cases = Cases.of([CASE, CASE])
    assert cases.count == 2
    assert cases.take([1]).hidden.tolist() == [CASE.hidden]
    assert isinstance(CASE, Case)
    with pytest.raises(AttributeError, match="width"):
        cases.width  # noqa: B018
