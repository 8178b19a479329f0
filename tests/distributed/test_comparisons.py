"""Preferences and rewards are learned like in one process at every layout, micro batch and packing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison_runs import LAYOUTS, METHODS, Case, train_all, write_examples
from tests.distributed.parity import Layout
from tests.distributed.ranks import RankPool

STEPS = 3


def train_methods(layout: Layout, packing: str, micro: int, written: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        name: train_all(Case(layout, name, packing, micro), each, folder / name, STEPS)
        for name, each in written.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("comparisons")
    for name in METHODS:
        (folder / name).mkdir()
    return {name: write_examples(folder / name, name) for name in METHODS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_micro_batch_and_packing_compares_answers_like_one_process(
    layout: Layout, ranks: RankPool, written: dict[str, Any], tmp_path: Path
) -> None:
    alone = replace(layout, parallel={}, zero_stage=1, recompute="none")
    (expected,) = ranks.run(train_methods, 1, alone, "none", 2, written, tmp_path / "alone")
    for name, figures in expected.items():
        assert len({each["loss"] for each in figures[:STEPS]}) == STEPS, name
    for found in ranks.run(train_methods, layout.world_size, layout, "documents", 1, written, tmp_path / "cut"):
        for name, figures in expected.items():
            assert len(found[name]) >= STEPS
            for step, (mine, theirs) in enumerate(zip(found[name], figures, strict=False)):
                assert mine.keys() == theirs.keys()
                if step == 0:  # before the first update all margins to the reference are 0, but for rounding
                    mine["accuracy"] = theirs["accuracy"]
                where = f"{name}, step {step}: {mine}, expected {theirs}"
                torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=0, atol=1e-9, msg=where)
