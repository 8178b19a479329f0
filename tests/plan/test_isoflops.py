"""IsoFLOP curves: lowest points are the law's, outliers are named, Chinchilla's runs give the paper's sizes."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from trimaran.runtime.plan.scaling.figures import Run
from trimaran.runtime.plan.scaling.fit import fit_two_variables
from trimaran.runtime.plan.scaling.isoflops import IsoFlop, compute_of, frontier, isoflops, outliers
from trimaran.runtime.plan.scaling.laws import DEFAULT

CHINCHILLA = Path(__file__).with_name("chinchilla.csv")
COMPUTES = [1e18 * 10**i for i in range(4)]


def made_runs(noise: float = 0.0, draw: int = 0) -> list[Run]:
    """Nine sizes around the best of each compute, 15% off that compute at most."""
    random, runs = np.random.default_rng(draw), []
    for flops in COMPUTES:
        best = DEFAULT.best(flops)[0]
        for factor in np.geomspace(1 / 3, 3, 9):
            tokens = flops * math.exp(random.uniform(-0.07, 0.07)) / 6 / (best * factor)
            loss = DEFAULT.loss(best * factor, tokens) * math.exp(noise * random.standard_normal())
            runs.append(Run(float(best * factor), float(tokens), loss))
    return runs


def test_the_lowest_points_are_those_of_the_law() -> None:
    curves = isoflops(made_runs(), DEFAULT.loss)
    assert len(curves) == len(COMPUTES)
    for curve, flops in zip(curves, COMPUTES, strict=True):
        assert len(curve.runs) == 9
        assert curve.flops == pytest.approx(flops, rel=0.1)
        assert {round(compute_of(run) / curve.flops, 9) for run in curve.runs} == {1.0}
        assert curve.size.value == pytest.approx(DEFAULT.best(curve.flops)[0], rel=0.08)
    line = frontier(curves)
    assert line is not None
    assert line.exponents[0].value == pytest.approx(DEFAULT.b / (DEFAULT.a + DEFAULT.b), abs=0.01)


def test_intervals_of_the_lowest_points_cover_the_truth() -> None:
    """Of 60 draws of four curves; a parabola is not the law, so its own lowest point without noise is the truth."""
    covered = []
    for draw in range(60):
        clean, noisy = (isoflops(made_runs(noise, draw), DEFAULT.loss) for noise in (0.0, 0.003))
        for truth, curve in zip(clean, noisy, strict=True):
            if curve.best is not None:
                covered.append(curve.size.covers(truth.size.value))
    assert len(covered) > 200
    assert 0.9 <= np.mean(covered) <= 0.99


def test_few_runs_of_one_compute_make_no_curve() -> None:
    assert isoflops(made_runs()[:4], DEFAULT.loss) == []
    assert frontier(isoflops(made_runs()[:18], DEFAULT.loss)) is None


def test_a_curve_whose_best_is_at_its_edge_says_so() -> None:
    runs = []
    for flops in COMPUTES:
        for size in np.geomspace(0.05, 0.5, 7) * DEFAULT.best(flops)[0]:
            runs.append(Run(float(size), float(flops / 6 / size), DEFAULT.loss(size, flops / 6 / size)))
    curves = isoflops(runs, DEFAULT.loss)
    assert len(curves) == len(COMPUTES)
    assert all(curve.best is None and "is at the edge" in curve.why for curve in curves)


def test_outliers_are_the_runs_that_were_made_so() -> None:
    runs = made_runs(noise=0.003)
    spoiled = [Run(runs[5].parameters, runs[5].tokens, 1.2 * runs[5].loss), runs[7]]
    runs[5] = spoiled[0]
    assert outliers(runs, DEFAULT.loss) == [spoiled[0]]


def chinchilla() -> list[Run]:
    with CHINCHILLA.open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [Run(row["parameters"], row["flop"] / (6 * row["parameters"]), row["loss"]) for row in rows]


def test_chinchilla_s_curves_say_63b_to_67b() -> None:
    """Hoffmann et al. 2022, table 3 and section 3.2: N grows as C^0.49, and 63B at 5.76e23 FLOP by this approach."""
    runs = chinchilla()
    law = fit_two_variables(runs, draws=20)

    def loss(parameters: float, tokens: float) -> float:
        return law.curve(parameters, tokens).value

    far_off = outliers(runs, loss)
    assert {5.00558, 4.66523} <= {run.loss for run in far_off}
    curves = isoflops([run for run in runs if run not in far_off], loss)
    line = frontier(curves)
    assert line is not None
    assert line.exponents[0].covers(0.49)
    assert 60e9 < line.predict(5.76e23, 5.76e23).value < 70e9
    assert sum(isinstance(curve, IsoFlop) and curve.best is not None for curve in curves) > 10
