"""Chips: a device's name finds its datasheet's peak, and nothing that is not known exactly has one."""

import pytest

from trimaran.runtime.plan.chips import CHIPS, chip_named, find_chip, peak_flops, peak_of

# As torch.cuda.get_device_name() and nvidia-smi give them: NVIDIA's list of supported GPUs, AMD's amdgpu.ids.
NAMES = {
    "A10": ["NVIDIA A10"],
    "A10G": ["NVIDIA A10G"],
    "A30": ["NVIDIA A30"],
    "A40": ["NVIDIA A40"],
    "RTX-A6000": ["NVIDIA RTX A6000"],
    "A100-40GB": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"],
    "A100-80GB": ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A100-SXM4-80GB"],
    "A800": ["NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"],
    "B200": ["NVIDIA B200"],
    "B300": ["NVIDIA B300 SXM6 AC"],
    "GB200": ["NVIDIA GB200"],
    "GB300": ["NVIDIA GB300"],
    "GH200-144GB": ["NVIDIA GH200 144G HBM3e"],
    "GH200-96GB": ["NVIDIA GH200 480GB", "NVIDIA GH200 120GB"],
    "H20": ["NVIDIA H20"],
    "H100-SXM": ["NVIDIA H100 80GB HBM3"],
    "H100-PCIe": ["NVIDIA H100 PCIe"],
    "H100-NVL": ["NVIDIA H100 NVL"],
    "H200": ["NVIDIA H200"],
    "H200-NVL": ["NVIDIA H200 NVL"],
    "H800": ["NVIDIA H800"],
    "H800-PCIe": ["NVIDIA H800 PCIe"],
    "L4": ["NVIDIA L4"],
    "L40": ["NVIDIA L40"],
    "L40S": ["NVIDIA L40S"],
    "MI210": ["AMD Instinct MI210"],
    "MI250": ["AMD Instinct MI250X / MI250", "AMD Instinct MI250"],
    "MI250X": ["AMD Instinct MI250X"],
    "MI300A": ["AMD Instinct MI300A"],
    "MI300X": ["AMD Instinct MI300X", "AMD Instinct MI300X VF", "AMD Instinct MI300X OAM"],
    "MI325X": ["AMD Instinct MI325X"],
    "MI350X": ["AMD Instinct MI350X"],
    "MI355X": ["AMD Instinct MI355X"],
    "RTX-3090": ["NVIDIA GeForce RTX 3090"],
    "RTX-4090": ["NVIDIA GeForce RTX 4090"],
    "RTX-5090": ["NVIDIA GeForce RTX 5090"],
    "RTX-6000-Ada": ["NVIDIA RTX 6000 Ada Generation"],
    "T4": ["Tesla T4"],
    "V100-PCIe": ["Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"],
    "V100-SXM": ["Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB", "Tesla V100-DGXS-32GB", "Tesla V100-SXM2-32GB-LS"],
    "V100-SXM-16GB": ["Tesla V100-SXM2-16GB"],
    "V100S-PCIe": ["Tesla V100S-PCIE-32GB"],
}


@pytest.mark.parametrize(("chip", "names"), NAMES.items())
def test_the_names_that_drivers_give_mean_one_chip(chip: str, names: list[str]) -> None:
    found = chip_named(chip)
    assert [find_chip(name) for name in names] == [found] * len(names)
    assert {peak_flops(name, "float16") for name in names} == {found.flops}
    assert {peak_flops(name, "bfloat16") for name in names} == {found.flops if found.has_bfloat16 else None}
    assert peak_flops(names[0], "float32") is None


def test_peaks_are_dense_and_of_what_torch_counts_as_a_device() -> None:
    """Vendors print twice as much, with sparsity, and AMD the two dies of a board together."""
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.5e12,
        "NVIDIA H100 PCIe": 756.5e12,
        "NVIDIA GH200 480GB": 989.5e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA L4": 121e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "AMD Instinct MI250X": 383e12 / 2,
        "AMD Instinct MI250X / MI250": 362.1e12 / 2,
        "AMD Instinct MI300X": 1307.4e12,
    }
    assert {name: peak_flops(name, "bfloat16") for name in peaks} == peaks


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "AMD EPYC 9654",
        "NVIDIA A10M",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A800-SXM4-40GB",
        "NVIDIA H20-3e",
        "NVIDIA H800 NVL",
        "NVIDIA L20",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA T400 4GB",
        "Tesla T40",
        "Tesla V100-FHHL-16GB",
        "AMD Instinct MI308X",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D v2",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A40-48Q",
        "GRID V100D-32Q",
        "",
    ],
)
def test_what_is_not_known_exactly_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_a_peak_is_told_in_words_and_why_there_is_none() -> None:
    found = peak_of("NVIDIA H100 80GB HBM3", "bfloat16")
    assert found.words == "H100-SXM's 989.5 TFLOP/s bfloat16"
    assert found.source.startswith("NVIDIA H100 datasheet (2023)")
    remedy = "give its peak by trimaran calibrate --output FILE, then --chip FILE"
    assert peak_of("Some GPU", "bfloat16").words == f"Some GPU is not in the table of datasheets; {remedy}"
    assert peak_of("NVIDIA A40-48Q", "float16").words == f"NVIDIA A40-48Q is a part of a GPU; {remedy}"
    words = peak_of("Tesla T4", "bfloat16").words
    assert words == "no peak of T4 is known in bfloat16: its datasheet has none"


def test_a_pattern_of_the_table_is_not_hidden_by_one_before_it() -> None:
    for chip in CHIPS:
        assert find_chip(NAMES.get(chip.name, [chip.name])[0]) is chip
        assert chip_named(chip.name.lower()) is chip
        assert chip.source


def test_an_8_bit_peak_is_about_twice_that_of_16_bits() -> None:
    pairs = [(chip.flops, chip.flops_8_bit) for chip in CHIPS if chip.flops_8_bit]
    assert len(pairs) >= 8
    assert all(wide * 2 == pytest.approx(narrow, rel=0.02) for wide, narrow in pairs)


def test_an_unknown_chip_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^chip 'H1000' is not known; the nearest is 'H100-SXM', of "):
        chip_named("H1000")
