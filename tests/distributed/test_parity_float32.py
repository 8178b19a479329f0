"""In float32 the losses of 20 steps agree to 1e-4 relative at every layout."""

from typing import Any

import pytest

from tests.distributed.parity import (
    FULL_STEPS,
    GPT,
    LLAMA,
    Layout,
    assert_all_train_like_one_process,
    by_world_size,
)
from tests.distributed.ranks import RankPool

LONG: dict[str, Any] = {"dtype": "float32", "num_steps": FULL_STEPS}
INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}
LAYOUTS = [
    Layout("pp2-dp2-zero2-tied", {"pp": 2, "dp": 2}, GPT, zero_stage=2, **LONG),
    Layout("tp2-dp2-without-shared-memory", {"tp": 2, "dp": 2}, LLAMA, shared_memory=False, **LONG),
    Layout(
        "tp2-pp2-interleaved-sequence-parallel",
        {"tp": 2, "pp": 2, "sequence_parallel": True, **INTERLEAVED},
        LLAMA,
        **LONG,
    ),
]
BATCHES = by_world_size(LAYOUTS)


def assert_close(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-4)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-3)
        assert result["held_out"] == pytest.approx(reference["held_out"], rel=1e-4)
    assert reference["losses"][-1] != reference["losses"][0]


@pytest.mark.parametrize("batch", BATCHES)
def test_float32_losses_agree_to_1e_4_relative(batch: str, ranks: RankPool) -> None:
    assert_all_train_like_one_process(BATCHES[batch], ranks, assert_close)
