"""benchmarks/data_dedup.py: our side finds the copies that are made, through files; without datatrove it says so."""

import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_dedup.py"


def test_our_side_removes_the_near_copies_that_are_made(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    texts = benchmark["read_texts"]([], 60)
    words = [text.split() for text in texts]
    copies = {
        number + 1
        for number, (first, second) in enumerate(pairwise(words))
        if len(first) == len(second) and sum(a == b for a, b in zip(first, second, strict=True)) > len(first) / 2
    }
    stay = benchmark["ours"](texts, tmp_path)
    assert copies
    assert set(range(60)) - stay <= copies
    assert len(stay) < 60


def test_without_datatrove_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match="pip install datatrove"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
