"""Scaling laws: known constants come back, intervals cover as often as they say, and too few runs are refused."""

import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from trimaran.runtime.plan.scaling.figures import Interval, Run, ScalingError
from trimaran.runtime.plan.scaling.fit import ONE_RATIO, SEVERAL_RATIOS, LossLaw, fit_loss, fit_two_variables, hold_out
from trimaran.runtime.plan.scaling.optima import find_optimum, fit_power_law
from trimaran.runtime.plan.scaling.published import PUBLISHED, Scale

ONE = {"E": 1.69, "C": 406.4, "c": 0.34}
TWO = {"E": 1.69, "A": 406.4, "a": 0.34, "B": 410.7, "b": 0.28}  # Hoffmann et al. 2022, equation 10
SIZES = [1e5 * 2**i for i in range(6)]
RATES = [1e-3 * 2**i for i in range(7)]


def one_ratio(sizes: Sequence[float] = SIZES, noise: float = 0.0, draw: int = 0, **constants: float) -> list[Run]:
    known, random = ONE | constants, np.random.default_rng(draw)
    scatter = np.exp(noise * random.standard_normal(len(sizes)))
    losses = [known["E"] + known["C"] / n ** known["c"] for n in sizes]
    return [Run(n, 20 * n, float(loss * each)) for n, loss, each in zip(sizes, losses, scatter, strict=True)]


def several_ratios(noise: float = 0.0, draw: int = 0) -> list[Run]:
    random = np.random.default_rng(draw)
    cells = list(itertools.product([1e6 * 3**i for i in range(4)], (5, 20, 80)))
    scatter = np.exp(noise * random.standard_normal(len(cells)))
    return [Run(n, r * n, two_variables(n, r * n) * float(each)) for (n, r), each in zip(cells, scatter, strict=True)]


def two_variables(n: float, d: float) -> float:
    return float(TWO["E"] + TWO["A"] / n ** TWO["a"] + TWO["B"] / d ** TWO["b"])


@pytest.mark.parametrize(
    ("runs", "form", "known"),
    [
        (one_ratio(), ONE_RATIO, ONE),
        (one_ratio(E=0.4, C=30, c=0.1), ONE_RATIO, {"E": 0.4, "C": 30, "c": 0.1}),
        (one_ratio(E=2.5, C=9e4, c=0.9), ONE_RATIO, {"E": 2.5, "C": 9e4, "c": 0.9}),
        (several_ratios(), SEVERAL_RATIOS, TWO),
    ],
)
def test_known_constants_come_back(runs: list[Run], form: str, known: dict[str, float]) -> None:
    law = fit_loss(runs, draws=50)
    assert law.form == form
    assert {name: each.value for name, each in law.constants.items()} == pytest.approx(known, rel=0.01)
    far = law.predict(1e10, 2e11)
    expected = two_variables(1e10, 2e11) if form == SEVERAL_RATIOS else known["E"] + known["C"] / 1e10 ** known["c"]
    assert far.value == pytest.approx(expected, rel=1e-3)
    assert far.low <= far.value <= far.high


@pytest.mark.parametrize("several", [False, True])
def test_intervals_cover_the_truth_in_95_of_100_draws(several: bool) -> None:
    """Each constant, the law's loss of a run 8 to 64 times as large, and that run's own loss with its scatter."""
    known, draws = TWO if several else ONE, 200
    n = 1e6 * 3**6 if several else SIZES[-1] * 8
    truth = two_variables(n, 20 * n) if several else ONE["E"] + ONE["C"] / n ** ONE["c"]
    covered: dict[str, list[bool]] = {}
    for draw in range(draws):
        runs = several_ratios(0.004, draw) if several else one_ratio(noise=0.004, draw=draw)
        law = fit_loss(runs, draws=100)
        for name, value in known.items():
            covered.setdefault(name, []).append(law.constants[name].covers(value))
        covered.setdefault("law", []).append(law.curve(n, 20 * n).covers(truth))
        new = truth * float(np.exp(0.004 * np.random.default_rng(10_000 + draw).standard_normal()))
        covered.setdefault("run", []).append(law.predict(n, 20 * n).covers(new))
    shares = {name: sum(each) / draws for name, each in covered.items()}
    assert all(0.9 <= share <= 0.99 for share in shares.values()), shares


def test_the_published_fit_of_chinchillas_runs_comes_back() -> None:
    """Besiroglu et al. 2024, table 1: 240 runs of Hoffmann et al.'s figure 4, without the five largest losses."""
    with (Path(__file__).parent / "chinchilla.csv").open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    rows = sorted(rows, key=lambda row: row["loss"])[:-5]
    law = fit_loss([Run(r["parameters"], r["flop"] / (6 * r["parameters"]), r["loss"]) for r in rows], 1e-3, draws=50)
    found = {name: each.value for name, each in law.constants.items()}
    assert found == pytest.approx({"E": 1.8172, "A": 482.01, "a": 0.3478, "B": 2085.43, "b": 0.3658}, rel=0.03)
    assert all(law.constants[name].covers(value) for name, value in {"a": 0.3478, "b": 0.3658}.items())


def test_outliers_move_a_fit_little() -> None:
    sizes = [1e5 * 1.5**i for i in range(12)]
    runs = one_ratio(sizes, 0.001)
    runs[5] = Run(runs[5].parameters, runs[5].tokens, 1.3 * runs[5].loss)
    law = fit_loss(runs, 1e-3, draws=50)
    assert law.constants["c"].value == pytest.approx(ONE["c"], abs=0.02)


def test_a_held_out_size_is_predicted_from_the_others() -> None:
    (held,) = hold_out(one_ratio(noise=0.002), SIZES[-1])
    assert held.run.parameters == SIZES[-1]
    assert abs(held.error) < 0.015
    assert held.predicted.covers(held.run.loss)
    assert len(hold_out(several_ratios(), 1e6 * 27)) == 3


def test_a_power_law_has_students_interval() -> None:
    points = [(n, 20 * n, 2 * n**-0.3) for n in SIZES]
    law = fit_power_law(points)
    assert [law.factor.value, law.exponents[0].value] == pytest.approx([2, -0.3])
    assert law.predict(1e9, 2e10).value == pytest.approx(2 * 1e9**-0.3)
    both = fit_power_law([(n, r * n, 1.79 * n**-0.713 * (r * n) ** 0.307) for n in SIZES[:3] for r in (10, 40)])
    assert [each.value for each in both.exponents] == [pytest.approx(-0.713), pytest.approx(0.307)]
    covered = []
    for draw in range(200):
        random = np.random.default_rng(draw)
        law = fit_power_law([(n, d, y * float(np.exp(0.1 * random.standard_normal()))) for n, d, y in points])
        new = 2 * 1e8**-0.3 * float(np.exp(0.1 * random.standard_normal()))
        covered.append((law.exponents[0].covers(-0.3), law.factor.covers(2), law.predict(1e8, 2e9).covers(new)))
    assert all(0.9 <= share <= 0.99 for share in np.mean(covered, axis=0)), np.mean(covered, axis=0)


def test_the_lowest_point_of_a_parabola_has_an_interval() -> None:
    points = [(rate, batch) for rate in RATES for batch in (8.0, 16.0, 32.0, 64.0)]
    covered = []
    for draw in range(200):
        random = np.random.default_rng(draw)
        line = [3 + 0.05 * np.log(rate / 6e-3) ** 2 + 0.004 * random.standard_normal() for rate in RATES]
        one = find_optimum(["rate"], [(rate,) for rate in RATES], line)
        bowl = [
            3 + 0.05 * np.log(r / 6e-3) ** 2 + 0.02 * np.log(b / 24) ** 2 - 0.02 * np.log(r / 6e-3) * np.log(b / 24)
            + 0.002 * random.standard_normal() for r, b in points
        ]  # fmt: skip
        two = find_optimum(["rate", "batch"], points, bowl)
        covered.append((one.at[0].covers(6e-3), two.at[0].covers(6e-3), two.at[1].covers(24), two.loss.covers(3)))
    assert all(0.9 <= share <= 0.99 for share in np.mean(covered, axis=0)), np.mean(covered, axis=0)
    exact = find_optimum(["rate"], [(r,) for r in RATES], [3 + 0.05 * np.log(r / 6e-3) ** 2 for r in RATES])
    assert exact.at[0].value == pytest.approx(6e-3)
    assert exact.curve(12e-3) == pytest.approx(3 + 0.05 * np.log(2) ** 2)


def bowl(best: float, scale: float = 0.05) -> list[float]:
    return [float(3 + scale * np.log(rate / best) ** 2) for rate in RATES]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (bowl(1e-4), "the best rate is at the edge, 0.001 of 0.001 to 0.064; widen low of rate"),
        (bowl(1.0), "the best rate is at the edge, 0.064 of 0.001 to 0.064; widen high of rate"),
        ([np.nan] * 7, "training diverged at every rate; widen low of rate"),
        (
            [3.2, 3.1, 3.06, 3.01, 3.0, np.inf, np.inf],
            "the best rate lies beyond 0.016, and at 0.032 training diverged or had twice the loss; try values between",
        ),
        (
            [3.0, 2.0, 3.0, *[np.inf] * 4],
            "needs 4 points or more, at 3 values of each, got 3 where training didn't diverge",
        ),
        ([2.0, 1.9, 2.0, 1986.0, 5.0, 9.0, np.inf], "got 3 where training didn't diverge or have twice the loss"),
        ([3, 3, 3, 2.99, 3, 2.9901, 2.9899], "at the edge, 0.064"),
    ],
)
def test_an_optimum_at_an_edge_is_refused(losses: list[float], sentence: str) -> None:
    with pytest.raises(ScalingError) as caught:
        find_optimum(["rate"], [(rate,) for rate in RATES], losses)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("fit", "sentence"),
    [
        (lambda: fit_loss([]), "has 3 constants and needs 4 sizes of the model or more for an interval, got 0"),
        (lambda: fit_loss(one_ratio(SIZES[:3])), "got 3; add rungs"),
        (lambda: fit_loss(one_ratio([1e5] * 9)), "got 1; add rungs"),
        (lambda: hold_out(one_ratio(SIZES[:4]), SIZES[3]), "got 3; add rungs"),
        (lambda: fit_two_variables(one_ratio()), "A/N^a and B/D^b can't be told apart; give several values"),
        (lambda: fit_two_variables([Run(n, n**2, 3.0) for n in SIZES]), "can't be told apart"),
        (lambda: fit_loss(several_ratios()[:4]), "needs 6 runs or more, of 3 sizes of the model and 3 counts"),
        (lambda: fit_loss(one_ratio()).predict(1e6, 1e8), "fitted at 20 tokens a parameter and says nothing of 100"),
        (lambda: fit_power_law([(1e5, 2e6, 1.0), (2e5, 4e6, 1.0)]), "needs 3 optima or more for an interval"),
        (lambda: fit_power_law([(n, 20 * n, 1.0) for n in SIZES]).predict(1e6, 1e6), "says nothing of 1"),
        (lambda: Run(1e5, 2e6, float("nan")), "loss of a run must be a number above 0 to have a logarithm, got nan"),
        (lambda: Run(0, 2e6, 1.0), "parameters of a run must be a number above 0"),
    ],
)
def test_what_no_number_can_be_told_of_is_refused(fit: Callable[[], LossLaw], sentence: str) -> None:
    with pytest.raises(ScalingError) as caught:
        fit()
    assert sentence in str(caught.value)


def test_equal_losses_give_a_law_that_is_flat() -> None:
    law = fit_loss([Run(n, 20 * n, 3.0) for n in SIZES], draws=50)
    assert law.predict(1e8, 2e9).value == pytest.approx(3.0, rel=1e-6)


def test_noise_that_leaves_everything_open_gives_wide_finite_intervals() -> None:
    law = fit_power_law([(1e5, 2e6, 1.0), (1.01e5, 2.02e6, 1e-40), (1.02e5, 2.04e6, 1e40)])
    far = law.predict(1e12, 2e13)
    assert 0 < far.low < far.high < float("inf")
    loss = fit_loss([Run(n, 20 * n, each) for n, each in zip(SIZES, (3.0, 9.0, 1.0, 8.0, 2.0, 7.0), strict=True)])
    assert np.isfinite([(each.low, each.high) for each in loss.constants.values()]).all()


def test_an_interval_is_told_with_its_bounds() -> None:
    assert str(Interval(2.4123, 2.3, 2.5)) == "2.412 (2.3 to 2.5)"


def test_published_laws_give_the_figures_of_their_papers() -> None:
    """DeepSeek LLM's 7B at 2T tokens: table 2 has a rate of 4.2e-4 and 2304 sequences of 4096 tokens."""
    laws = {(law.name, law.quantity): law for law in PUBLISHED}
    deepseek = Scale(6.9e9, 6.1e9, 2e12, 2e12 * (72 * 30 * 4096**2 + 12 * 30 * 4096 * 4096))
    assert laws["DeepSeek LLM", "rate"].at(deepseek) == pytest.approx(4.2e-4, rel=0.05)
    assert laws["DeepSeek LLM", "batch"].at(deepseek) == pytest.approx(2304 * 4096, rel=0.1)
    small = Scale(108e6, 1e9, 1e11, 1e20)
    assert laws["OLMo ladder", "rate"].at(small) == pytest.approx(0.0047)
    assert laws["OLMo ladder", "batch"].at(small) == pytest.approx(160 * 2048)
    # worked out by hand: 1.79 * 1e9**-0.713 * 1e11**0.307; 0.58 * 1e11**0.571
    assert laws["Step Law", "rate"].at(small) == pytest.approx(1.79 * 10 ** (-6.417 + 3.377))
    assert laws["Step Law", "batch"].at(small) == pytest.approx(0.58 * 10**6.281)
    assert all(law.source and law.formula for law in PUBLISHED)
