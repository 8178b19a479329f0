"""Layers over stages: nothing lost, and no better cut exists."""

import itertools
import random

import pytest

from trimaran.models.config import TransformerConfig
from trimaran.runtime.pipeline.partition import (
    partition_layers,
    stage_costs,
    stage_layers,
)


def _counts(ranges: list[range]) -> list[int]:
    return [len(held) for held in ranges]


def _config(**changes: object) -> TransformerConfig:
    fields: dict[str, object] = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "vocab_size": 50257,
        "max_seq_len": 1024,
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
    }
    return TransformerConfig.model_validate(fields | changes)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1, 1), (30, 4), (7, 7), (32, 8), (96, 64), (5, 2)])
def test_every_layer_is_held_once_in_order(num_layers: int, num_stages: int) -> None:
    ranges = partition_layers(num_layers, num_stages, 1.0, 0.2, 3.7)
    assert len(ranges) == num_stages
    assert [layer for held in ranges for layer in held] == list(range(num_layers))
    assert min(_counts(ranges)) >= 1


def test_no_cut_has_a_smaller_maximum_and_ties_are_as_even_as_can_be() -> None:
    rng = random.Random(3)
    for _ in range(150):
        num_layers = rng.randint(1, 11)
        num_stages = rng.randint(1, min(5, num_layers))
        # Multiples of 1/8 are exact in binary, so that ties are ties in this brute force too.
        layer, embedding, head = (rng.randint(1, 16) / 8, rng.randint(0, 24) / 8, rng.randint(0, 40) / 8)

        def rank(
            counts: tuple[int, ...], layer: float = layer, embedding: float = embedding, head: float = head
        ) -> tuple[float, int]:
            costs = [count * layer for count in counts]
            costs[0] += embedding
            costs[-1] += head
            return max(costs), sum(count * count for count in counts)

        cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
        best = min(rank(tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers)))) for cut in cuts)
        assert rank(tuple(_counts(partition_layers(num_layers, num_stages, layer, embedding, head)))) == best


def test_equal_costs_give_even_counts_and_the_rest_to_later_stages() -> None:
    assert _counts(partition_layers(30, 4)) == [7, 7, 8, 8]
    assert _counts(partition_layers(32, 4)) == [8, 8, 8, 8]
    # An embedding and a head, however light, are a reason to give the rest to the middle.
    assert _counts(partition_layers(30, 4, 1.0, 0.01, 0.01)) == [7, 8, 8, 7]


def test_inexact_decimal_costs_still_tie_exactly() -> None:
    assert _counts(partition_layers(6, 3, 0.1, 0.1, 0.1)) == [2, 2, 2]


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert _counts(partition_layers(12, 4, 1.0, 0.0, 3.0)) == [3, 4, 4, 1]


def test_an_explicit_list_is_used_as_it_is() -> None:
    assert partition_layers(6, 3, head_cost=9.0, layers_per_stage=[1, 3, 2]) == [range(1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 3], r"one entry per stage, pp x virtual_stages \(3\); got 2"),
        ([3, 3, 0], r"at least one layer in every stage; got \[3, 3, 0\]"),
        ([3, 3, 1], r"must sum to num_layers \(6\); got \[3, 3, 1\] with sum 7"),
    ],
)
def test_an_explicit_list_that_loses_layers_is_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_layers(6, 3, layers_per_stage=counts)


def test_fewer_layers_than_stages_are_refused_with_the_valid_numbers() -> None:
    with pytest.raises(ValueError, match=r"num_layers \(3\).*use at least 4 layers or 1 to 3 stages"):
        partition_layers(3, 4)
    with pytest.raises(ValueError, match="num_stages must be at least 1; got 0"):
        partition_layers(3, 0)


@pytest.mark.parametrize(
    "costs", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (1.0, 0.0, float("inf")), (float("nan"), 0.0, 0.0)]
)
def test_costs_that_make_no_sense_are_refused(costs: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        partition_layers(4, 2, *costs)


@pytest.mark.parametrize(
    "config",
    [
        _config(),
        _config(activation="swiglu", norm="rmsnorm", position="rotary", bias=False, tie_embeddings=False),
        _config(num_kv_heads=4, head_dim=32, ffn_hidden_size=1000),
    ],
)
def test_stage_flops_add_up_to_the_models(config: TransformerConfig) -> None:
    layers = stage_layers(config, 512, 4)
    assert 3 * sum(stage_costs(config, 512, layers)) == pytest.approx(config.flops_per_token(512), rel=1e-12)


def test_gpt2_small_weighs_its_head_as_several_layers() -> None:
    config = _config()
    assert config.layer_forward_flops(1024) == 24 * 768**2 + 4 * 768 * 1024
    assert config.head_forward_flops() / config.layer_forward_flops(1024) == pytest.approx(4.46, abs=0.01)
    assert _counts(stage_layers(config, 1024, 4)) == [3, 4, 4, 1]
    assert _counts(stage_layers(config, 1024, 4, [3, 3, 3, 3])) == [3, 3, 3, 3]


def test_a_thousand_layers_partition_quickly() -> None:
    ranges = partition_layers(1000, 64, 1.0, 0.1, 4.5)
    assert max(_counts(ranges)) == 16
