"""The check of muP: sizes stay over the width, without muP they grow, and a missing part of it is seen."""

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed.ranks import RankPool
from trimaran.models import init
from trimaran.models.parallel.parameter import InitSpec
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.checks.mup_check import (
    ActivationSizes,
    Growth,
    measure,
    plain_spec,
    random_batches,
    spec_at_width,
)

WIDTHS, NUM_STEPS = (32, 64, 128, 256), 6
MUP: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 160, "vocab_size": 257,
    "init": "mup", "mup_base_width": 32,
}  # fmt: skip


def make_spec(**changes: Any) -> RunSpec:
    return parse_spec(
        {
            "model": MUP | changes,
            "parallel": {"tp": 2, "pp": 2},
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {"lr": 2e-3},
            "train": {"num_steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 16},
        }
    )


def measured(spec: RunSpec, growth: Growth = "heads", rates: str = "mup") -> ActivationSizes:
    """Runs on a rank of its own. rates "one": every matrix learns at the full rate."""

    def one_rate(config: Any, *roles: Any) -> InitSpec:
        return InitSpec(init.init_spec(config, *roles).std)

    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=100)
    replacement: Callable[..., InitSpec] = init.init_spec if rates == "mup" else one_rate
    with (
        patch("trimaran.models.layers.attention.init_spec", replacement),
        patch("trimaran.models.layers.mlp.init_spec", replacement),
    ):
        return measure(spec, WIDTHS, NUM_STEPS, growth, random_batches, mesh, torch.device("cpu"))


def slopes(sizes: ActivationSizes, step: int = NUM_STEPS) -> dict[str, float]:
    return {module: sizes.slope(module, step) for module in sizes.sizes}


@pytest.mark.parametrize(
    ("growth", "changes"),
    [
        ("heads", {}),
        ("head_dim", {"tie_embeddings": True}),
        (
            "heads",
            {"position": "learned", "norm": "layernorm", "bias": True, "block": "parallel", "activation": "gelu"},
        ),
    ],
    ids=["llama", "wider-heads-tied", "parallel-block-gpt"],
)
def test_under_mup_sizes_do_not_depend_on_the_width(growth: Growth, changes: dict[str, Any], ranks: RankPool) -> None:
    (sizes,) = ranks.run(measured, 1, make_spec(**changes), growth)
    assert {"embedding", "layers.0", "layers.1", "final_norm", "logits"} <= sizes.sizes.keys()
    after = slopes(sizes)
    assert max(map(abs, after.values())) < 0.2, after
    # Only the logits shrink before the first step, by the root of the width, and that passes (Yang et al. 2022,
    # appendix D.1).
    start = slopes(sizes, 0)
    assert start.pop("logits") == pytest.approx(-0.5, abs=0.1)
    assert max(map(abs, start.values())) < 0.2, start


def test_with_one_deviation_and_rate_for_all_widths_sizes_grow(ranks: RankPool) -> None:
    (sizes,) = ranks.run(measured, 1, plain_spec(make_spec()))
    after = slopes(sizes)
    assert after["logits"] > 0.4, after
    assert after["layers.1"] > 1.0, after


@pytest.mark.parametrize(
    ("changes", "rates"), [({}, "one"), ({"logits_scale": 1.0}, "mup")],
    ids=["without-its-rates", "without-its-factor-of-the-logits"],
)  # fmt: skip
def test_the_check_sees_a_part_of_mup_missing(changes: dict[str, Any], rates: str, ranks: RankPool) -> None:
    (sizes,) = ranks.run(measured, 1, make_spec(**changes), "heads", rates)
    assert max(slopes(sizes).values()) > 0.3, slopes(sizes)


def test_slope_is_that_of_a_power_of_the_width() -> None:
    sizes = ActivationSizes(
        (10, 100, 1000), {"a": [[1.0, 1.0, 1.0]], "b": [[2.0, 20.0, 200.0]], "c": [[0.0, 1.0, 1.0]]}
    )
    assert sizes.slope("a", 0) == pytest.approx(0.0)
    assert sizes.slope("b", 0) == pytest.approx(1.0)
    assert math.isnan(sizes.slope("c", 0))


def test_a_width_changes_everything_in_proportion() -> None:
    wide = spec_at_width(make_spec(), 128, "heads").transformer
    assert (wide.num_heads, wide.num_kv_heads, wide.head_dim, wide.ffn_hidden_size) == (8, 4, 16, 320)
    assert (wide.logits_scale, wide.attention_scale) == (0.25, pytest.approx(16**-0.5))
    wide = spec_at_width(make_spec(), 128, "head_dim").transformer
    assert (wide.num_heads, wide.head_dim) == (4, 32)
    assert wide.attention_scale == pytest.approx(math.sqrt(8) / 32), "at the base, a width of 32, a head has 8"
    single = spec_at_width(make_spec(num_kv_heads=1), 256, "heads")
    assert (single.transformer.num_kv_heads, single.world_size) == (1, 1)


@pytest.mark.parametrize(
    ("width", "growth", "sentence"),
    [
        (
            40, "heads", ("at width 40 the model's num_heads (4 at hidden_size 64) would be 2.5, no whole number; "
            "give --widths that are multiples of 16"),
        ),
        (40, "head_dim", None),
        (66, "head_dim", "head_dim (16 at hidden_size 64) would be 16.5"),
    ],
)  # fmt: skip
def test_a_width_that_gives_no_whole_heads_is_refused(width: int, growth: Growth, sentence: str | None) -> None:
    if sentence is None:
        assert spec_at_width(make_spec(), width, growth).transformer.head_dim == 10
        return
    with pytest.raises(ValueError, match="whole number") as caught:
        spec_at_width(make_spec(), width, growth)
    assert sentence in str(caught.value)
