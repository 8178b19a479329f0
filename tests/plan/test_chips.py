"""Chips: a device's name finds its datasheet's peak, and nothing that is not known exactly has one."""

import pytest

from trimaran.runtime.plan.chips import CHIPS, chip_named, find_chip, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_accelerators_have_a_peak_in_16_bit(name: str, peak: float) -> None:
    assert peak_flops(name, "bfloat16") == peak_flops(name, "float16") == peak
    assert peak_flops(name, "float32") is None


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "AMD EPYC 9654",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "",
    ],
)
def test_what_is_not_known_exactly_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_a_pattern_of_the_table_is_not_hidden_by_one_before_it() -> None:
    names = {"A100-40GB": "NVIDIA A100-SXM4-40GB", "RTX-4090": "NVIDIA GeForce RTX 4090"}
    for chip in CHIPS:
        assert find_chip(names.get(chip.name, chip.name)) is chip
        assert chip_named(chip.name.lower()) is chip
        assert chip.source


def test_an_8_bit_peak_is_about_twice_that_of_16_bits() -> None:
    pairs = [(chip.flops, chip.flops_8_bit) for chip in CHIPS if chip.flops_8_bit]
    assert len(pairs) >= 8
    assert all(wide * 2 == pytest.approx(narrow, rel=0.02) for wide, narrow in pairs)


def test_an_unknown_chip_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^chip 'H1000' is not known; the nearest is 'H100-SXM', of "):
        chip_named("H1000")
