"""The model's shape: published parameter counts, derived defaults, and errors of a wrong shape."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import nearest_divisors, nearest_multiples, one_of
from trimaran.models.presets import preset

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "num_heads": 4, "vocab_size": 10, "max_seq_len": 6}


def test_small_shape_is_counted_by_hand_with_grouped_heads_and_biases() -> None:
    config = TransformerConfig(
        **{
            **SMALL,
            "num_kv_heads": 2,
            "ffn_hidden_size": 12,
            "position": "learned",
            "norm": "layernorm",
            "activation": "swiglu",
            "bias": True,
        }
    )
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + (8 + 4 + 4 + 8)
    feed_forward = 3 * 8 * 12 + 12 + 12 + 8
    norms = 2 * (8 + 8)
    assert config.num_parameters() == 10 * 8 + 6 * 8 + 2 * (attention + feed_forward + norms) + 16 + 10 * 8


def test_experts_are_counted_whole_and_as_a_token_meets_them() -> None:
    config = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        ffn_hidden_size=14336,
        vocab_size=32000,
        max_seq_len=32768,
        num_experts=8,
    )
    # Mixtral 8x7B as released; Jiang et al. 2024, section 1, print 47B and 13B.
    assert config.num_parameters() == 46_702_792_704
    assert config.num_active_parameters() == config.num_parameters() - 32 * 6 * 3 * 4096 * 14336 == 12_879_925_248
    norms_and_embedding = 65 * 4096 + 32000 * 4096
    attention = 12 * 32 * 128 * 1024 * 32  # 12 * heads * head_dim * seq_len * layers
    assert config.flops_per_token(1024) == 6 * (config.num_active_parameters() - norms_and_embedding) + attention
    plain = TransformerConfig(**SMALL)
    assert plain.num_active_parameters() == plain.num_parameters()


def test_tied_embeddings_count_once() -> None:
    untied = TransformerConfig(**SMALL)
    tied = TransformerConfig(**SMALL, tie_embeddings=True)
    assert untied.num_parameters() - tied.num_parameters() == 10 * 8
    assert untied.flops_per_token(6) == tied.flops_per_token(6)


def test_optional_sizes_are_filled_in() -> None:
    config = TransformerConfig(**SMALL)
    assert (config.num_kv_heads, config.head_dim, config.ffn_hidden_size) == (4, 2, 32)


def test_explicit_head_dim_may_differ_from_hidden_over_heads() -> None:
    config = TransformerConfig(**{**SMALL, "hidden_size": 10, "head_dim": 6})
    assert config.num_parameters() == 2 * 10 * 10 + 2 * (4 * 10 * 24 + 3 * 10 * 40 + 2 * 10) + 10


def test_flops_match_the_megatron_formula_without_recompute() -> None:
    # Narayanan et al. 2021, section 5.1: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) with a recomputed forward. Of its
    # layers' four passes one is the recomputed forward, so training proper has 72 B s l h^2 (1 + s/(6h) + V/(12 l h)).
    config, seq_len = preset("gpt3-175b"), 2048
    layers, hidden, vocabulary = config.num_layers, config.hidden_size, config.vocab_size
    formula = 72 * layers * hidden**2 * (1 + seq_len / (6 * hidden) + vocabulary / (12 * layers * hidden))
    assert config.flops_per_token(seq_len) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize(("tp", "padded"), [(1, 50257), (2, 50258), (8, 50264), (50257, 50257)])
def test_vocabulary_is_padded_to_a_multiple_of_tp(tp: int, padded: int) -> None:
    assert preset("gpt2-124m").padded_vocab_size(tp) == padded


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"num_kv_heads": 3},
            "num_kv_heads: num_heads (4) must be divisible by num_kv_heads (3); set num_kv_heads to 1, 2 or 4",
        ),
        (
            {"hidden_size": 10},
            (
                "hidden_size: hidden_size (10) must be divisible by num_heads (4) when head_dim is not given; "
                "set hidden_size to 8 or 12, or num_heads to 1, 2, 5 or 10, or give head_dim"
            ),
        ),
        (
            {"head_dim": 3},
            (
                "head_dim: head_dim (3) must be even, because rotary positions turn pairs of numbers; "
                "set head_dim to 2 or 4, or position to learned"
            ),
        ),
    ],
)
def test_wrong_shape_names_rule_and_remedy(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TransformerConfig(**{**SMALL, **changes})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_scaling": {"kind": "linear", "factor": 2.0}, "position": "learned"}, "position is learned"),
        ({"rotary_scaling": {"kind": "ntk", "factor": 2.0}, "rotary_dim": 2}, "two rotated pairs or more"),
        (
            {"rotary_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position": 8}, "rotary_base": 1.0},
            "must be above 1",
        ),
        (
            {"rotary_scaling": {"kind": "llama3", "factor": 2.0, "original_max_position": 8, "low_freq_factor": 4.0}},
            "must be below its high_freq",
        ),
        ({"rotary_scaling": {"kind": "yarn", "factor": 2.0}}, "needs original_max_position"),
    ],
)
def test_a_rotary_scaling_that_no_formula_covers_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TransformerConfig(**{**SMALL, **changes})


def test_all_broken_shape_rules_are_reported_together() -> None:
    with pytest.raises(ValidationError) as caught:
        TransformerConfig(**{**SMALL, "num_kv_heads": 3, "head_dim": 3})
    assert "num_kv_heads: " in str(caught.value)
    assert "head_dim: " in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, True, "4", 1.5, None, 2**31])
def test_sizes_must_be_positive_whole_numbers(value: object) -> None:
    with pytest.raises(ValidationError):
        TransformerConfig(**{**SMALL, "num_layers": value})


def test_config_cannot_be_changed() -> None:
    config = TransformerConfig(**SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.num_layers = 3  # type: ignore[misc]


@settings(max_examples=100, deadline=None)
@given(number=st.integers(1, 10**6), wanted=st.integers(1, 10**6))
def test_nearest_values_obey_the_rule_they_are_offered_for(number: int, wanted: int) -> None:
    divisors = nearest_divisors(number, wanted)
    assert divisors == sorted(set(divisors))
    assert all(number % divisor == 0 for divisor in divisors)
    assert 1 <= len(divisors) <= 6
    multiples = nearest_multiples(number, wanted)
    assert all(multiple % number == 0 and abs(multiple - wanted) <= number for multiple in multiples)
    assert 1 <= len(multiples) <= 2


def test_values_are_listed_as_a_person_would() -> None:
    assert [one_of([1]), one_of([1, 2]), one_of([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
