"""Generation gives the same tokens at every layout, past the window of the model too."""

from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPool
from trimaran.runtime.infer.generate import Sampling, draw, generate
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import parse_spec
from trimaran.runtime.train.job import build_stages_of_rank

PARALLEL: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"},
    {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
]


def generate_on_rank(parallel: dict[str, Any], position: str, temperature: float) -> list[int]:
    spec = parse_spec(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_heads": 2,
                "vocab_size": 263,
                "position": position,
                "max_seq_len": 9,
                "init_std": 0.3,
            },
            "parallel": parallel,
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": "float64"},
            "train": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 8},
        }
    )
    mesh = build_mesh(**{axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp")}, timeout_s=60)
    stages = build_stages_of_rank(spec, mesh, torch.device("cpu"))
    tokens = generate(stages, mesh, spec, [5, 6, 7], Sampling(8, temperature=temperature, top_k=50, seed=3))
    assert all(stage.training for stage in stages.values()), "training mode is back"
    mesh.close()
    return tokens


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_at_every_layout(parallel: dict[str, Any], temperature: float, ranks: RankPool) -> None:
    sizes = [parallel.get(axis, 1) for axis in ("tp", "pp", "dp")]
    position = "learned"
    # With sequence parallelism the window is a multiple of tp, so compare before it is full there.
    length = 5 if parallel.get("sequence_parallel") else 8
    (expected,) = ranks.run(generate_on_rank, 1, {}, position, temperature)
    for tokens in ranks.run(generate_on_rank, sizes[0] * sizes[1] * sizes[2], parallel, position, temperature):
        assert len(tokens) == 8
        assert tokens[:length] == expected[:length]


def test_draw_follows_temperature_and_top_k() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0], dtype=torch.float64)
    assert draw(logits, 0, Sampling(1, temperature=0.0)) == 1
    drawn = [draw(logits, position, Sampling(1, temperature=1.0, top_k=2)) for position in range(200)]
    assert set(drawn) == {1, 2}
    # P(1) = 1 / (1 + e^-1) = 0.731; 200 draws lie within 0.15 of it with overwhelming probability, and the draws are fixed
    assert abs(drawn.count(1) / 200 - 0.731) < 0.15


def test_negative_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature \(-1\) must not be negative"):
        Sampling(1, temperature=-1)
