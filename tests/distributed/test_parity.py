"""Any layout, same maths: in float64 every layout trains like one process.

Losses agree to 1e-9, and so does every gradient and parameter at the end: after 20 steps at layouts that have every
option in them, after 4 at the others.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import test_experts, test_parity_encoders, test_parity_float32, test_parity_zero
from tests.distributed.parity import (
    DROPOUT,
    FULL_STEPS,
    GPT,
    LLAMA,
    Layout,
    assert_all_train_like_one_process,
    by_world_size,
    full,
)
from tests.distributed.ranks import RankPool

# Multi-query heads that every tp rank holds, and a block whose branches read one norm and share a collective.
FALCON: dict[str, Any] = GPT | {
    "num_kv_heads": 1, "position": "rotary", "rotary_dim": 2, "block": "parallel_one_norm", "bias": False,
    "norm_bias": True, "head_bias": True,
}  # fmt: skip
# Heads in the proportions of Falcon-7B (71 read one key-value head) and of Qwen2-0.5B (14 read two).
FALCON_7B: dict[str, Any] = FALCON | {"num_heads": 7, "head_dim": 4, "bias": True, "query_key_norm": "width"}
QWEN_500M: dict[str, Any] = LLAMA | {"num_heads": 14, "num_kv_heads": 2, "head_dim": 4, "attention_dropout": 0.1}
BLOOM: dict[str, Any] = GPT | {
    "position": "alibi",
    "embedding_norm": True,
    "block": "parallel",
    "z_loss": 1e-2,
    "label_smoothing": 0.1,
}
GEMMA: dict[str, Any] = LLAMA | {
    "norm_position": "sandwich", "activation": "geglu_tanh", "attention_window": 3,
    "attention_pattern": ["window", "full"], "logits_softcap": 2.0,
    "attention_softcap": 1.0, "attention_scale": 0.3, "embedding_scale": 4.0, "tie_embeddings": True,
    "query_key_norm": "head",
}  # fmt: skip
OLMO: dict[str, Any] = LLAMA | {
    "norm_position": "branch",
    "query_key_norm": "width",
    "rotary_interleaved": True,
    "qkv_bias": True,
}
POST_NORM: dict[str, Any] = GPT | {
    "norm_position": "post",
    "activation": "relu",
    "norm_weight": False,
    "logits_scale": 0.5,
}
TFIXUP: dict[str, Any] = GPT | {"norm_position": "none", "init": "tfixup", "embedding_scale": 4.0}
DEEPNORM: dict[str, Any] = GPT | {"norm_position": "post", "init": "deepnorm", "embedding_scale": 4.0}
MUP: dict[str, Any] = LLAMA | {"init": "mup", "mup_base_width": 4, "mup_base_head_dim": 2, "tie_embeddings": True}
# As SmolLM2-135M has them; the second model's heads are not grouped.
UNEVEN: dict[str, Any] = LLAMA | {
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 4,
    "qkv_bias": True,
    "query_key_norm": "head",
}
UNEVEN_ALIBI: dict[str, Any] = BLOOM | {"num_heads": 5, "head_dim": 4} | {"attention_dropout": 0.1}
ALL_AXES = {"tp": 2, "pp": 2, "dp": 2}
INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}
BACKWARDS = Path(__file__).with_name("backwards_pp2.csv")
ZBV = {"virtual_stages": 2, "schedule": "zbv"}

LAYOUTS = full(
    [
        Layout("tp4-gpt", {"tp": 4}, GPT),
        Layout("tp2-without-shared-memory", {"tp": 2}, shared_memory=False),
        Layout("tp2-sequence-parallel", {"tp": 2, "sequence_parallel": True}),
        Layout("tp4-sequence-parallel-gpt", {"tp": 4, "sequence_parallel": True}, GPT),
        Layout("pp4-tied", {"pp": 4}, GPT, global_batch_size=8),
        Layout("pp2-interleaved-tied", {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}, GPT),
        Layout("pp1-interleaved-tied", {"virtual_stages": 2, "schedule": "interleaved_1f1b"}, GPT),
        Layout("pp2-uneven", {"pp": 2, "layers_per_stage": [3, 1]}),
        # Its first stage is on the last rank.
        Layout("pp2-schedule-file-tied-dropout", {"pp": 2, "schedule_file": str(BACKWARDS)}, GPT | DROPOUT),
        Layout("pp4-zb-h1-tied", {"pp": 4, "schedule": "zb_h1"}, GPT, global_batch_size=8),
        Layout("pp4-zb-h2-tied-p2p-groups", {"pp": 4, "schedule": "zb_h2"}, GPT, p2p_groups=True, shared_memory=False),
        Layout("pp2-zbv-tied-p2p-groups", {"pp": 2} | ZBV, GPT, p2p_groups=True, shared_memory=False),
        Layout(
            "tp2-pp2-dp2-ep2-zbv-uneven",
            ALL_AXES | ZBV | {"ep": 2, "layers_per_stage": [2, 1, 1, 1]},
            LLAMA | DROPOUT | {"num_layers": 5, "num_experts": 4},
            global_batch_size=8,
            recompute="full",
        ),
        Layout("pp2-recompute-2-falcon", {"pp": 2}, FALCON | DROPOUT, recompute="2"),
        # What NCCL's path does, carried by gloo.
        Layout("pp2-p2p-groups", {"pp": 2}, p2p_groups=True, shared_memory=False),
        Layout("pp2-interleaved-p2p-groups", {"pp": 2} | INTERLEAVED, p2p_groups=True, shared_memory=False),
        Layout(
            "pp3-interleaved-tied-p2p-groups",
            {"pp": 3} | INTERLEAVED,
            GPT | {"num_layers": 6},
            p2p_groups=True,
            shared_memory=False,
            global_batch_size=3,
        ),
        Layout("pp4-gpipe-tied-p2p-groups", {"pp": 4, "schedule": "gpipe"}, GPT, p2p_groups=True, shared_memory=False),
        Layout("dp4", {"dp": 4}, GPT),
        Layout("dp2-without-shared-memory", {"dp": 2}, GPT, shared_memory=False),
        Layout("tp2-pp2", {"tp": 2, "pp": 2}),
        Layout("pp2-dp2", {"pp": 2, "dp": 2}, GPT),
        Layout("tp2-pp2-dp2", {"tp": 2, "pp": 2, "dp": 2}, global_batch_size=8),
        Layout("tp2-pp2-dp2-tied-sequence-parallel", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT),
        Layout(
            "tp2-pp2-dp2-interleaved",
            {"tp": 2, "pp": 2, "dp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "sequence_parallel": True},
        ),
        Layout("tp2-pp2-dp2-dropout", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, GPT | DROPOUT),
        Layout("tp2-one-layer", {"tp": 2}, LLAMA | {"num_layers": 1}),
        Layout("pp4-30-layers", {"pp": 4}, GPT | {"num_layers": 30, "init_std": 0.1}),
        Layout("tp2-9-heads-over-3", {"tp": 2, "uneven_heads": True}, UNEVEN),
        Layout(
            "tp2-pp2-sequence-parallel-5-heads",
            {"tp": 2, "pp": 2, "sequence_parallel": True, "uneven_heads": True},
            UNEVEN_ALIBI,
        ),
        Layout(
            "tp2-uneven-olmo",
            {"tp": 2, "uneven_heads": True},
            OLMO | {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4},
        ),
        Layout("tp4-falcon-7b", {"tp": 4, "uneven_heads": True}, FALCON_7B),
        Layout("tp4-14-heads-over-2", {"tp": 4, "uneven_heads": True}, QWEN_500M),
        Layout("tp4-falcon", {"tp": 4}, FALCON),
        Layout("tp2-pp2-sequence-parallel-falcon", {"tp": 2, "pp": 2, "sequence_parallel": True}, FALCON),
        Layout("tp2-pp2-bloom", {"tp": 2, "pp": 2}, BLOOM),
        Layout("tp4-gemma", {"tp": 4}, GEMMA),
        Layout("tp2-pp2-sequence-parallel-gemma", {"tp": 2, "pp": 2, "sequence_parallel": True}, GEMMA),
        Layout("tp2-pp2-sequence-parallel-olmo", {"tp": 2, "pp": 2, "sequence_parallel": True}, OLMO),
        Layout("tp2-pp2-post-norm", {"tp": 2, "pp": 2}, POST_NORM),
        Layout("tp2-pp2-tfixup", {"tp": 2, "pp": 2}, TFIXUP),
        Layout("tp2-pp2-sequence-parallel-deepnorm", {"tp": 2, "pp": 2, "sequence_parallel": True}, DEEPNORM),
        Layout("tp2-pp2-mup", {"tp": 2, "pp": 2}, MUP),
        Layout("tp2-dp2-zero3-mup", {"tp": 2, "dp": 2}, MUP, zero_stage=3),
        Layout(
            "tp2-pp2-dp2-sequence-parallel-zero2-dropout-falcon",
            {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
            FALCON | DROPOUT,
            zero_stage=2,
        ),
        # These two bring together the options that the others have one at a time.
        Layout(
            "tp2-pp2-dp2-uneven-zero0-without-shared-memory-dropout",
            ALL_AXES | {"sequence_parallel": True, "uneven_heads": True, "layers_per_stage": [3, 1]},
            UNEVEN | DROPOUT,
            zero_stage=0,
            shared_memory=False,
        ),
        Layout(
            "tp2-pp2-dp2-ep2-interleaved-uneven-zero0-without-shared-memory-dropout",
            ALL_AXES | INTERLEAVED | {"ep": 2, "uneven_heads": True, "layers_per_stage": [2, 1, 1, 1]},
            UNEVEN | DROPOUT | {"num_layers": 5, "num_experts": 4},
            zero_stage=0,
            shared_memory=False,
        ),
    ],
    [
        "pp2-interleaved-tied",
        "tp2-pp2-sequence-parallel-5-heads",
        "pp4-tied",
        "tp2-pp2-dp2-uneven-zero0-without-shared-memory-dropout",
    ],
)
BATCHES = by_world_size(LAYOUTS)


@pytest.mark.parametrize("batch", BATCHES)
def test_layouts_train_like_one_process(batch: str, ranks: RankPool) -> None:
    assert_all_train_like_one_process(BATCHES[batch], ranks)


# ---------------------------------------------------------------- what the layouts cover, and what they cost

EVERY_LAYOUT = [
    *LAYOUTS,
    *test_experts.LAYOUTS,
    *test_parity_encoders.LAYOUTS,
    *test_parity_float32.LAYOUTS,
    *test_parity_zero.LAYOUTS,
]
OPTIONS = (
    "dp",
    "dropout",
    "encoder",
    "ep",
    "experts",
    "pp",
    "sequence_parallel",
    "tied",
    "tp",
    "uneven_heads",
    "uneven_layers",
    "virtual_stages",
    "without_shared_memory",
    "zero0",
)
MAX_STEPS = 555


def test_every_pair_of_options_is_on_together_in_some_layout() -> None:
    """A fault that takes two options to show is seen by some layout in float64."""
    covered = {
        pair
        for layout in EVERY_LAYOUT
        if layout.dtype == "float64"
        for pair in combinations(sorted(layout.options()), 2)
    }
    assert [pair for pair in combinations(OPTIONS, 2) if pair not in covered] == []


def test_seven_layouts_of_full_length_have_every_option() -> None:
    """What grows over the steps is seen with every option: the other layouts train a few steps."""
    long = [layout for layout in EVERY_LAYOUT if layout.dtype == "float64" and layout.num_steps == FULL_STEPS]
    assert len(long) == 7
    assert {option for layout in long for option in layout.options()} >= set(OPTIONS)


def test_steps_of_all_layouts_are_few() -> None:
    """What parity costs: the seconds of a step depend on the machine, the number of steps does not."""
    assert len(LAYOUTS) == len({layout.name for layout in LAYOUTS})
    assert sum(layout.num_steps for layout in EVERY_LAYOUT) <= MAX_STEPS
