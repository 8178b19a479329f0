"""Pictures of plans, searches, published runs and laws: whole SVG files with what they promise, the same every time."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.launchers.runs import trimaran_here
from trimaran.launchers.report.ranks import Grid

ROOT = Path(__file__).parents[2]
FALCON = str(ROOT / "examples" / "falcon-40b.yaml")
SMALL = ("--set", "parallel.dp=2", "--set", "train.global_batch_size=16")


def words_of(path: Path) -> set[str]:
    """Texts that matplotlib has drawn, which it leaves as comments above their outlines."""
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    return {each.strip() for each in re.findall(r"<!--(.*?)-->", text)}


def test_a_plan_is_drawn_with_memory_timeline_and_map(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        outcome = trimaran_here(tmp_path, "plan", FALCON, *SMALL, "--picture", name)
        assert outcome.code == 0, outcome.err
    assert f"plan drawn in {name}" in outcome.err
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    words = words_of(tmp_path / "one.svg")
    assert {"H100-SXM", "parameters", "activations", "forward", "backward", "pipeline rank", "node 7"} <= words
    assert "tp 7 · pp 3 · dp 1" in words
    assert "where ranks live: tp inside a node; dp, pp between nodes" in words
    assert "the step: 8 of 8 microbatches, 1f1b" in words


def test_a_search_is_drawn_with_its_fastest(tmp_path: Path) -> None:
    arguments = ("--search", "--gpus", "32", "--fix", "train.recompute=none", "--picture", "search.svg")
    outcome = trimaran_here(tmp_path, "plan", FALCON, *SMALL, *arguments)
    assert outcome.code == 0, outcome.err
    words = words_of(tmp_path / "search.svg")
    assert "estimated seconds of a step" in words
    assert any(word.startswith("planned: tp ") for word in words)
    assert any(re.fullmatch(r"\d+ x \d+ x \d+", word) for word in words)


def test_published_runs_are_drawn(tmp_path: Path) -> None:
    outcome = trimaran_here(tmp_path, "plan", "--published", "--picture", "published.svg")
    assert outcome.code == 0, outcome.err
    words = words_of(tmp_path / "published.svg")
    assert {"vtrain-mds", "nanotron", "predicted: seconds of a step", "measured: GiB of the fullest rank"} <= words


def test_a_law_is_drawn_with_curves_and_frontier(tmp_path: Path) -> None:
    runs = str(ROOT / "tests" / "plan" / "chinchilla.csv")
    outcome = trimaran_here(tmp_path, "scaling", "fit", runs, "--picture", "law.svg")
    assert outcome.code == 0, outcome.err
    words = words_of(tmp_path / "law.svg")
    assert {"outliers", "frontier", "by the law of the loss", "by the lowest points", "95% of one more point"} <= words


@pytest.mark.parametrize("command", [("plan", FALCON), ("scaling", "fit", "runs.csv")])
def test_a_picture_is_svg(tmp_path: Path, command: tuple[str, ...]) -> None:
    outcome = trimaran_here(tmp_path, *command, "--picture", "plan.jpg")
    assert outcome.code == 2
    assert outcome.last_line == "error: --picture must end in .svg; got plan.jpg"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ((8, 4, 12), "tp inside a node; dp, pp between nodes"),
        ((2, 1, 4), "tp, dp inside a node"),
        ((1, 1, 1), "one rank"),
        ((1, 4, 8), "dp inside a node; pp between nodes"),
    ],
)
def test_what_crosses_nodes_follows_from_the_order_of_ranks(layout: tuple[int, int, int], words: str) -> None:
    grid = Grid.of(dict(zip(("tp", "pp", "dp"), layout, strict=True)), 8)
    assert grid is not None
    assert grid.crossings == words
    mesh = [grid.coordinates(rank) for rank in range(grid.ranks)]
    assert len({tuple(each.items()) for each in mesh}) == grid.ranks


@pytest.mark.parametrize("parallel", [{"tp": "two"}, {"pp": 0}, {"dp": 1 << 40}, {"tp": 1 << 15, "dp": 1 << 15}])
def test_a_layout_that_is_none_is_not_drawn(parallel: dict[str, object]) -> None:
    assert Grid.of(parallel, 8) is None
