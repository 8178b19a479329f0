"""The page of a search and its ladder: self-contained, with every picture, and escaped."""

import re
from pathlib import Path

import pytest

from tests.launchers.test_report import charts_of
from tests.runtime.tune.ladders import WIDTHS, read, record, shape, trials_of
from trimaran.launchers.report.tune_page import SearchResult, write_tune_page
from trimaran.runtime.tune.extrapolate import extrapolate
from trimaran.runtime.tune.propose import importances
from trimaran.runtime.tune.space import space_of
from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection

SPACE = {
    "optimizer.lr": {"low": 1e-3, "high": 0.256, "log": True, "step": 4},
    "train.global_batch_size": [2, 8, 32, 128],
}


def test_a_ladder_has_all_its_pictures_on_one_page(tmp_path: Path) -> None:
    fields = {"space": SPACE, "ladder": {"vary": ["rate", "batch"], "rungs": [shape(width) for width in WIDTHS]}}
    ladder, space = read(**fields)
    trials = trials_of(ladder, space, 0.001)
    found = extrapolate(ladder, space, trials, str(tmp_path / "target"))
    result = SearchResult("a <b>", record(**fields).objective, space, trials, ladder, found)
    page = write_tune_page(result, tmp_path).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "The target", "Best rate of each rung", "Best batch of each rung", "The law of the rate",
        "The law of the batch", "The law of the loss", "Trials by outcome", "History", "What mattered (fANOVA)",
        "Slices: complete trials over each key of the space", "Rate x batch", "Learning curves", "Trials",
    ]  # fmt: skip
    drawn = charts_of(page)
    assert len(drawn) == 5 + 1 + 2 + 5 + 1
    assert page.count('<table class="bars">') == 2
    curve = drawn["law-loss"]
    assert (curve["log"], curve["lines"][-1]["label"], curve["lines"][-1]["marker"]) == ("x", "target, predicted", "*")
    assert len(curve["bands"][0]["x"]) == len(curve["bands"][0]["low"]) == 61
    by_batch = drawn["rate-by-batch-0"]["lines"][0]
    assert by_batch["shades"][by_batch["words"].index(min(by_batch["words"], key=lambda text: text.split()[-1]))] == 0
    assert "a &lt;b&gt;" in page
    assert not re.search(r'(?:src|href)="(?!#)', page), "nothing is fetched"
    assert not re.findall(r'id="([^"]*)"(?=.*id="\1")', page), "ids are unique"
    assert all(f">{rung.name}<" in page for rung in ladder.rungs)


def test_a_search_with_two_objectives_shows_its_front_and_failures(tmp_path: Path) -> None:
    raw = {"model.activation": ["gelu", "swiglu"], "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    space, errors = space_of(raw, {}, "base.yaml", is_grid=False)
    assert not errors
    objectives = [ObjectiveSection(), ObjectiveSection(metric="tokens_per_second")]
    values = [{"model.activation": name, "optimizer.lr": rate} for name in ("gelu", "swiglu") for rate in (1e-3, 2e-3)]
    trials = [
        Trial(number=n, values=each, state="complete", objectives=(3.0 - n, 100.0 - n), folder=f"trials/{n}")
        for n, each in enumerate(values)
    ]
    broken = Trial(number=4, values=values[0], state="failed", folder="trials/4", error="a <crash>")
    result = SearchResult("pareto", objectives, space, [*trials, broken])
    page = write_tune_page(result, tmp_path).read_text()
    assert "Pareto front" in page
    assert "failed: a &lt;crash&gt;" in page
    assert "swiglu" in page
    assert "The trials that none beats in both" in page
    assert charts_of(page)["slice-0"]["ticks"]["names"] == ["gelu", "swiglu"], "an axis has every listed value"
    empty = write_tune_page(SearchResult("none", objectives, space, []), tmp_path).read_text()
    assert "no trial yet" in empty


def test_importance_finds_what_the_loss_depends_on() -> None:
    raw = {"optimizer.lr": [1e-3, 2e-3, 4e-3, 8e-3], "optimizer.weight_decay": [0.0, 0.1, 0.2]}
    space, _ = space_of(raw, {}, "base.yaml", is_grid=True)
    trials = [
        Trial(
            number=3 * i + j, values={"optimizer.lr": rate, "optimizer.weight_decay": decay}, state="complete",
            objectives=(3.0 + i + 0.01 * j,), folder="",
        )
        for i, rate in enumerate(raw["optimizer.lr"])
        for j, decay in enumerate(raw["optimizer.weight_decay"])
    ]  # fmt: skip
    shares = importances([ObjectiveSection()], space, trials)
    assert shares["optimizer.lr"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert importances([ObjectiveSection()], space, trials[:2]) == {}
