"""Models that fill in hidden tokens train at every layout as in one process: see test_parity."""

from typing import Any

import pytest

from tests.distributed.parity import DROPOUT, GPT, Layout, assert_all_train_like_one_process, by_world_size, full
from tests.distributed.ranks import RankPool

BERT: dict[str, Any] = GPT | {
    "objective": "masked_lm", "norm_position": "post", "embedding_norm": True, "num_token_types": 2,
    "activation": "gelu", "head_transform": True,
    "head_bias": True,
}  # fmt: skip
XLNET: dict[str, Any] = GPT | {
    "objective": "permutation_lm", "position": "relative", "norm_position": "post", "qkv_bias": False,
    "out_bias": False, "head_bias": True,
}  # fmt: skip
ALL_AXES = {"tp": 2, "pp": 2, "dp": 2}
LAYOUTS = full(
    [
        Layout("tp2-pp2-dp2-zero3-bert", ALL_AXES, BERT, zero_stage=3),
        Layout("tp2-pp2-dp2-sequence-parallel-dropout-bert", ALL_AXES | {"sequence_parallel": True}, BERT | DROPOUT),
        Layout("pp2-interleaved-xlnet", {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}, XLNET),
        Layout("tp2-pp2-dp2-zero3-xlnet", ALL_AXES, XLNET, zero_stage=3),
        Layout("tp2-pp2-dp2-sequence-parallel-dropout-xlnet", ALL_AXES | {"sequence_parallel": True}, XLNET | DROPOUT),
        Layout(
            "tp2-pp2-dp2-ep2-uneven-zero0-without-shared-memory-bert",
            ALL_AXES | {"ep": 2, "uneven_heads": True, "layers_per_stage": [3, 1]},
            BERT | {"num_heads": 5, "head_dim": 4, "num_experts": 4, "mlp_bias": False},
            zero_stage=0,
            shared_memory=False,
        ),
    ],
    ["pp2-interleaved-xlnet"],
)
BATCHES = by_world_size(LAYOUTS)


@pytest.mark.parametrize("batch", BATCHES)
def test_layouts_train_like_one_process(batch: str, ranks: RankPool) -> None:
    assert_all_train_like_one_process(BATCHES[batch], ranks)
