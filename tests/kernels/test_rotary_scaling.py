"""Rotary frequencies for longer contexts against transformers' and against what each method promises."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimaran.kernels.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryScaling,
    YarnScaling,
    rotary_frequencies,
    rotary_tables,
)

CPU = torch.device("cpu")
ORIGINAL = 2048


def theirs(
    kind: str, head_dim: int, base: float, seq_len: int | None = None, **parameters: Any
) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies (float32) and attention factor."""
    rope = {"rope_type": kind, "rope_theta": base, **parameters}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=seq_len)


def assert_equal(
    scaling: RotaryScaling, expected: tuple[torch.Tensor, float], head_dim: int, base: float, seq_len: int = 1
) -> None:
    frequencies, factor = rotary_frequencies(head_dim, base, scaling, seq_len, CPU)
    assert frequencies.dtype == torch.float64
    torch.testing.assert_close(frequencies, expected[0].double(), rtol=2e-6, atol=0)  # theirs are float32
    assert factor == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("head_dim", [4, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
class TestAgainstTransformers:
    @pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
    def test_linear(self, head_dim: int, base: float, factor: float) -> None:
        assert_equal(LinearScaling(factor), theirs("linear", head_dim, base, factor=factor), head_dim, base)

    @pytest.mark.parametrize("seq_len", [10, ORIGINAL, ORIGINAL + 1, 10 * ORIGINAL])
    @pytest.mark.parametrize("factor", [1.0, 4.0])
    def test_dynamic(self, head_dim: int, base: float, factor: float, seq_len: int) -> None:
        expected = theirs("dynamic", head_dim, base, seq_len, factor=factor)
        assert_equal(DynamicNTKScaling(factor, ORIGINAL), expected, head_dim, base, seq_len)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"beta_fast": 48.0, "beta_slow": 2.5},
            {"attention_factor": 1.7},
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            {"mscale": 0.5},
            {"truncate": False},
        ],
    )
    @pytest.mark.parametrize("factor", [1.0, 16.0])
    def test_yarn(self, head_dim: int, base: float, factor: float, options: dict[str, Any]) -> None:
        expected = theirs("yarn", head_dim, base, factor=factor, original_max_position_embeddings=ORIGINAL, **options)
        assert_equal(YarnScaling(factor, ORIGINAL, **options), expected, head_dim, base)

    @pytest.mark.parametrize("factors", [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (2.0, 0.5, 11.0)])
    def test_llama3(self, head_dim: int, base: float, factors: tuple[float, float, float]) -> None:
        names = dict(zip(("factor", "low_freq_factor", "high_freq_factor"), factors, strict=True))
        expected = theirs("llama3", head_dim, base, original_max_position_embeddings=ORIGINAL, **names)
        assert_equal(Llama3Scaling(*factors, ORIGINAL), expected, head_dim, base)

    def test_ntk_is_their_dynamic_one_with_factor_1_at_that_many_times_the_length(
        self, head_dim: int, base: float
    ) -> None:
        assert_equal(NTKScaling(6.0), theirs("dynamic", head_dim, base, 6 * ORIGINAL, factor=1.0), head_dim, base)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest() -> None:
    plain, scaled = (rotary_frequencies(64, 10000.0, scaling, 1, CPU)[0] for scaling in (None, NTKScaling(5.0)))
    assert scaled[0] == plain[0] == 1.0
    torch.testing.assert_close(scaled[-1], plain[-1] / 5.0, rtol=1e-12, atol=0)


def test_tables_use_the_frequencies_and_the_attention_factor() -> None:
    scaling = YarnScaling(8.0, 64)
    frequencies, factor = rotary_frequencies(16, 10000.0, scaling, 1, CPU)
    cos, sin = rotary_tables(3, 5, 16, 10000.0, torch.float64, CPU, scaling=scaling)
    angles = torch.outer(torch.arange(3.0, 8.0, dtype=torch.float64), frequencies)
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=0, atol=1e-15)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=0, atol=1e-15)
    assert factor > 1.2


def test_a_part_of_a_sequence_scales_by_the_whole_length() -> None:
    scaling = DynamicNTKScaling(2.0, 8)
    whole = rotary_tables(0, 32, 16, 10000.0, torch.float64, CPU, scaling=scaling)
    part = rotary_tables(8, 4, 16, 10000.0, torch.float64, CPU, scaling=scaling, seq_len=32)
    alone = rotary_tables(8, 4, 16, 10000.0, torch.float64, CPU, scaling=scaling)
    assert part[0].equal(whole[0][8:12])
    assert not alone[0].equal(part[0])


@pytest.mark.parametrize(
    ("rot", "scaling", "message"),
    [
        (7, None, r"rot \(7\) must be even"),
        (0, None, r"rot \(0\) must be even and at least 2"),
        (8, LinearScaling(0.5), "at least 1, got LinearScaling"),
        (2, NTKScaling(2.0), "two pairs or more, got rot = 2"),
        (8, Llama3Scaling(8.0, 4.0, 4.0, 8192), r"low_freq_factor \(4.0\) must be below high_freq_factor \(4.0\)"),
    ],
)
def test_what_no_formula_covers_is_refused(rot: int, scaling: RotaryScaling | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_frequencies(rot, 10000.0, scaling, 1, CPU)
