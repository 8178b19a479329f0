"""DeepSpeed optimizes runs that learn from examples and from comparisons as our own optimizer does."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import test_sft
from tests.distributed.comparison_runs import METHODS, Case, train_all, write_examples
from tests.distributed.parity import GPT, LLAMA, Layout
from tests.distributed.ranks import RankPool

STEPS = 3
TIED = GPT | {"bias": False}  # a key's bias has a gradient of rounding errors, which AdamW makes steps of
LAYOUTS = [
    Layout("dp2-stage1-tied", {"dp": 2}, TIED, zero_stage=1),
    Layout("tp2-pp2-stage2-tied", {"tp": 2, "pp": 2, "sequence_parallel": True}, TIED, zero_stage=2),
    Layout("dp2-stage3", {"dp": 2}, LLAMA, zero_stage=3),
]
METHODS_BY_LAYOUT = {
    "dp2-stage1-tied": ("reward", "ipo", "kto"),
    "tp2-pp2-stage2-tied": ("dpo", "orpo"),
    "dp2-stage3": ("kto", "dpo"),
}
"""Each method at one layout at least."""


def train_on_rank(layout: Layout, backend: str, sft: Path, written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Figures of the steps of each method, and those of held-out examples."""
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    found: dict[str, Any] = {"sft": test_sft.train_on_rank(test_sft.Way(layout, True, 1, backend), sft)}
    for name, each in written.items():
        figures = train_all(Case(layout, name, "documents", 1, backend), each, folder / name, STEPS)
        figures[0].pop("accuracy", None)  # before the first update all margins to the reference are rounding errors
        found[name] = figures
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_examples_and_comparisons_are_learned_as_by_our_own(layout: Layout, ranks: RankPool, tmp_path: Path) -> None:
    layout = replace(layout, dtype="float32")
    (tmp_path / "sft").mkdir()
    for number in range(test_sft.STEPS + 1):
        test_sft.store(tmp_path / "sft", number)
    written = {}
    assert set(METHODS) == set().union(*METHODS_BY_LAYOUT.values())
    for name in METHODS_BY_LAYOUT[layout.name]:
        (tmp_path / name).mkdir()
        written[name] = write_examples(tmp_path / name, name)
    alone = replace(layout, parallel={}, zero_stage=1)
    (expected,) = ranks.run(train_on_rank, 1, alone, "native", tmp_path / "sft", written, tmp_path / "alone")
    found = ranks.run(
        train_on_rank, layout.world_size, layout, "deepspeed", tmp_path / "sft", written, tmp_path / "deepspeed"
    )
    for each in found:
        assert each["sft"]["counts"] == expected["sft"]["counts"]
        for name in ("steps", "held_out"):
            torch.testing.assert_close(each["sft"][name], expected["sft"][name], rtol=1e-5, atol=1e-6)
        for method in written:
            assert len({figures["loss"] for figures in expected[method][:STEPS]}) == STEPS
            for mine, theirs in zip(each[method], expected[method], strict=True):
                assert mine.keys() == theirs.keys()
                values = list(mine.values()), list(theirs.values())
                torch.testing.assert_close(*values, rtol=1e-5, atol=2e-6, msg=f"{method}: {mine}, {theirs}")
