"""ZeRO 1 to 3 with every schedule, with and without recomputation, train like one process."""

from itertools import product
from pathlib import Path

import pytest

from tests.distributed.parity import (
    DROPOUT,
    GPT,
    LLAMA,
    Layout,
    assert_all_train_like_one_process,
    by_world_size,
    full,
)
from tests.distributed.ranks import RankPool

SCHEDULES: list[dict[str, object]] = [
    *({"schedule": name} for name in ("gpipe", "1f1b", "zb_h1", "zb_h2")),
    *({"schedule": name, "virtual_stages": 2} for name in ("interleaved_1f1b", "zbv", "dualpipev")),
    {"schedule_file": str(Path(__file__).with_name("backwards_pp2.csv"))},
]
EXPERTS = LLAMA | DROPOUT | {"num_experts": 4}
FEATURES = [
    ("tied-dropout", {"pp": 2, "dp": 2}, GPT | DROPOUT),
    ("tp2-sequence-parallel", {"pp": 2, "dp": 2, "tp": 2, "sequence_parallel": True}, GPT),
    ("ep2-experts", {"pp": 2, "dp": 2, "ep": 2}, EXPERTS),
    ("five-layers", {"pp": 2, "dp": 2}, LLAMA | {"num_layers": 5}),
]


RECOMPUTE = ("none", "full", "selective")
MORE_MICROBATCHES = ("zb_h2", "zbv", "dualpipev", "file")


def covering() -> list[Layout]:
    """Every pair of schedule and stage; every stage with each recomputation and each feature."""
    layouts = []
    for (number, schedule), stage in product(enumerate(SCHEDULES), (1, 2, 3)):
        feature, parallel, model = FEATURES[(number + stage) % len(FEATURES)]
        recompute, order = RECOMPUTE[(number + 2 * stage) % 3], str(schedule.get("schedule", "file"))
        layouts.append(
            Layout(
                f"pp2-dp2-{order}-zero{stage}-{feature}-recompute-{recompute}",
                parallel | schedule,
                model,
                zero_stage=stage,
                recompute=recompute,
                global_batch_size=8 if order in MORE_MICROBATCHES else 4,
            )
        )
    return layouts


LAYOUTS = full(
    [
        *covering(),
        Layout("dp4-shards-of-2-zero1", {"dp": 4}, GPT, zero_stage=1, shard_size=2),
        Layout("dp4-shards-of-2-zero2", {"dp": 4}, GPT, zero_stage=2, shard_size=2, shared_memory=False),
        Layout("dp4-shards-of-2-ep2-zero3", {"dp": 4, "ep": 2}, EXPERTS, zero_stage=3, shard_size=2),
        Layout("dp4-shards-of-1-ep2-zero3", {"dp": 4, "ep": 2}, EXPERTS, zero_stage=3, shard_size=1),
        Layout("dp4-shards-of-2-ep4-zero2", {"dp": 4, "ep": 4}, EXPERTS, zero_stage=2, shard_size=2),
        Layout("dp2-zero3-without-shared-memory", {"dp": 2}, LLAMA, zero_stage=3, shared_memory=False),
    ],
    ["pp2-dp2-zb_h1-zero3-tp2-sequence-parallel-recompute-selective"],
)
BATCHES = by_world_size(LAYOUTS)


@pytest.mark.parametrize("batch", BATCHES)
def test_layouts_train_like_one_process(batch: str, ranks: RankPool) -> None:
    assert_all_train_like_one_process(BATCHES[batch], ranks)


def test_every_pair_is_covered() -> None:
    """Of schedule, stage, recomputation and feature: all pairs but of schedule and feature."""
    parts = [layout.name.removeprefix("pp2-dp2-").split("-", 2) for layout in covering()]
    stages = {(order, stage) for order, stage, _ in parts}
    assert len(stages) == len(SCHEDULES) * 3
    recomputed = {(stage, layout.recompute) for (_, stage, _), layout in zip(parts, covering(), strict=True)}
    assert len(recomputed) == 3 * len(RECOMPUTE)
    by_schedule = {(order, layout.recompute) for (order, _, _), layout in zip(parts, covering(), strict=True)}
    assert len(by_schedule) == len(SCHEDULES) * len(RECOMPUTE)
    featured = {(stage, rest.split("-recompute")[0]) for _, stage, rest in parts}
    assert len(featured) == 3 * len(FEATURES)
