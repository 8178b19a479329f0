"""Chips as their datasheets print them: peak of matrix products, memory and its rate, links, power. No torch.

Every figure is the vendor's: dense products with 32-bit accumulation, links in one direction. What runs reach of them
is a calibration's.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Final

_GB: Final = 10**9
_GIB: Final = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        pattern: what the device's name matches, letters' case aside. The first chip of `CHIPS` that matches is meant.
        flops: dense peak in FLOP/s of bfloat16 and float16, which are equal on all of these that have both.
        flops_8_bit: of fp8; None: it has none.
        memory_bytes: of the device's memory, whole.
        memory_rate: bytes a second.
        processors: that share out a product's tiles: streaming multiprocessors, or compute units.
        link_rate: bytes a second and direction to the other chips of a node; 0: there is no such link.
        watts: board power.
        source: the datasheet.
        has_bfloat16: whether its matrix units take bfloat16; V100 and T4 have float16 alone.
    """

    name: str
    pattern: str
    flops: float
    flops_8_bit: float | None
    memory_bytes: int
    memory_rate: float
    processors: int
    link_rate: float
    watts: float
    source: str
    has_bfloat16: bool = True

    def peak(self, dtype: str) -> float | None:
        """Return the dense matrix peak in FLOP/s for a compute type; None where it is not known."""
        wide = self.flops if self.has_bfloat16 else None
        return {"bfloat16": wide, "float16": self.flops, "fp8": self.flops_8_bit}.get(dtype)


# Vendors print figures "with sparsity" that are twice these. A narrower pattern is before a wider one.
CHIPS: Final = (
    Chip(
        "V100S-PCIe", r"\bV100S-PCIE\b", 130e12, None, 32 * _GIB, 1134 * _GB, 80, 16 * _GB, 250,
        "NVIDIA V100 datasheet (January 2020): float16 alone; PCIe 3", has_bfloat16=False,
    ),
    Chip(
        "V100-PCIe", r"\bV100-PCIE\b", 112e12, None, 32 * _GIB, 900 * _GB, 80, 16 * _GB, 250,
        "NVIDIA V100 datasheet (January 2020): float16 alone; PCIe 3; there is one of 16 GB", has_bfloat16=False,
    ),
    Chip(
        "V100-SXM-16GB", r"\bV100-SXM2-16GB\b", 125e12, None, 16 * _GIB, 900 * _GB, 80, 150 * _GB, 300,
        "NVIDIA V100 datasheet (January 2020): float16 alone", has_bfloat16=False,
    ),
    Chip(
        "V100-SXM", r"\bV100(?:-SXM[23](?:-32GB.*)?|-DGXS-32GB)?$", 125e12, None, 32 * _GIB, 900 * _GB, 80, 150 * _GB,
        300, "NVIDIA V100 datasheet (January 2020): float16 alone", has_bfloat16=False,
    ),
    Chip(
        "T4", r"\b(?:Tesla|NVIDIA) T4$|^T4$", 65e12, None, 16 * _GB, 300 * _GB, 40, 16 * _GB, 70,
        "NVIDIA T4 datasheet (March 2019): float16 alone; PCIe 3", has_bfloat16=False,
    ),
    Chip(
        "A10", r"\bA10\b", 125e12, None, 24 * _GB, 600 * _GB, 72, 32 * _GB, 150,
        "NVIDIA A10 datasheet (2021): 125 | 250 TFLOP/s; PCIe 4",
    ),
    Chip(
        "A10G", r"\bA10G\b", 70e12, None, 24 * _GB, 600 * _GB, 80, 32 * _GB, 300,
        "NVIDIA A10G datasheet (2021), of AWS G5: 70 | 140 TFLOP/s; PCIe 4",
    ),
    Chip(
        "A30", r"\bA30\b", 165e12, None, 24 * _GB, 933 * _GB, 56, 100 * _GB, 165,
        "NVIDIA A30 datasheet (2021): 165 | 330 TFLOP/s; NVLink to one other",
    ),
    Chip(
        "A40", r"\bA40\b", 149.7e12, None, 48 * _GB, 696 * _GB, 84, 32 * _GB, 300,
        "NVIDIA A40 datasheet (2021): 149.7 | 299.4 TFLOP/s; PCIe 4, as its NVLink goes to one other",
    ),
    Chip(
        "RTX-A6000", r"\bRTX[- ]A6000\b", 154.8e12, None, 48 * _GB, 768 * _GB, 84, 32 * _GB, 300,
        "NVIDIA RTX A6000 datasheet (2021): 309.7 TFLOP/s with sparsity; PCIe 4",
    ),
    Chip(
        "A100-40GB", r"\bA100\b.*\b40GB\b", 312e12, None, 40 * _GIB, 1555 * _GB, 108, 300 * _GB, 400,
        "NVIDIA A100 datasheet (2021), SXM; the peak of PCIe is the same",
    ),
    Chip(
        "A800", r"\bA800\b(?!.*\b40GB\b)", 312e12, None, 80 * _GIB, 2039 * _GB, 108, 200 * _GB, 400,
        "as A100, with 400 GB/s NVLink",
    ),
    # Leonardo's of 64 GB is a chip of its own, with more processors.
    Chip(
        "A100-80GB", r"\bA100\b(?!.*\b64GB\b)", 312e12, None, 80 * _GIB, 2039 * _GB, 108, 300 * _GB, 400,
        "NVIDIA A100 datasheet (2021), SXM; the peak of PCIe is the same",
    ),
    Chip(
        "H100-NVL", r"\bH100[- ]NVL\b", 835.5e12, 1671e12, 94 * _GIB, 3900 * _GB, 132, 300 * _GB, 400,
        "NVIDIA H100 datasheet (2023): 1,671 TFLOP/s with sparsity",
    ),
    Chip(
        "H100-PCIe", r"\bH100[- ]PCIe\b", 756.5e12, 1513e12, 80 * _GIB, 2000 * _GB, 114, 64 * _GB, 350,
        "NVIDIA H100 datasheet (2023): 1,513 TFLOP/s with sparsity",
    ),
    Chip(
        "H100-96GB-500W", r"\bH100-96GB-500W\b", 989.5e12, 1979e12, 96 * _GIB, 2400 * _GB, 132, 450 * _GB, 500,
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: H100 with 96 GB HBM2e and 500 W; else as H100",
    ),
    Chip(
        "H100-SXM", r"\bH100\b", 989.5e12, 1979e12, 80 * _GIB, 3350 * _GB, 132, 450 * _GB, 700,
        "NVIDIA H100 datasheet (2023): 1,979 TFLOP/s with sparsity",
    ),
    Chip(
        "H800-PCIe", r"\bH800[- ]PCIe\b", 756.5e12, 1513e12, 80 * _GIB, 2000 * _GB, 114, 64 * _GB, 350,
        "as H100 PCIe, which has no NVLink either but to one other",
    ),
    Chip(
        "H800", r"\bH800\b(?! NVL)", 989.5e12, 1979e12, 80 * _GIB, 3350 * _GB, 132, 200 * _GB, 700,
        "as H100, with 400 GB/s NVLink",
    ),
    Chip(
        "H20", r"\bH20\b(?!-3e| NVL16)", 148e12, 296e12, 96 * _GIB, 4000 * _GB, 78, 450 * _GB, 400,
        "NVIDIA H20 datasheet (2023): 148 TFLOP/s, for which sparsity gives nothing",
    ),
    Chip(
        "H200-NVL", r"\bH200[- ]NVL\b", 835.5e12, 1671e12, 141 * _GB, 4800 * _GB, 132, 450 * _GB, 600,
        "NVIDIA H200 datasheet (2024): 1,671 TFLOP/s with sparsity",
    ),
    Chip(
        "H200", r"\bH200\b", 989.5e12, 1979e12, 141 * _GB, 4800 * _GB, 132, 450 * _GB, 700,
        "NVIDIA H200 datasheet (2024): 1,979 TFLOP/s with sparsity",
    ),
    Chip(
        "GH200-144GB", r"\bGH200[ -]144GB?\b", 989.5e12, 1979e12, 144 * _GB, 4900 * _GB, 132, 450 * _GB, 1000,
        "NVIDIA GH200 Grace Hopper Superchip datasheet (2024): 1,979 TFLOP/s with sparsity; watts with the CPU",
    ),
    Chip(
        "GH200-96GB", r"\bGH200\b", 989.5e12, 1979e12, 96 * _GB, 4000 * _GB, 132, 450 * _GB, 1000,
        "NVIDIA GH200 Grace Hopper Superchip datasheet (2024); the 120GB or 480GB of its name are the CPU's memory",
    ),
    Chip(
        "B200", r"\bB200\b", 2250e12, 4500e12, 180 * _GB, 7700 * _GB, 148, 900 * _GB, 1000,
        "NVIDIA HGX B200 datasheet (2025): 36 PFLOP/s with sparsity for eight",
    ),
    Chip(
        "GB200", r"\bGB200\b", 2500e12, 5000e12, 186 * _GB, 8000 * _GB, 152, 900 * _GB, 1200,
        "NVIDIA GB200 NVL72 datasheet (2025): 360 PFLOP/s with sparsity, 13.4 TB and 576 TB/s for 72",
    ),
    Chip(
        "GB300", r"\bGB300\b", 2500e12, 5000e12, 277 * _GB, 8000 * _GB, 152, 900 * _GB, 1400,
        "NVIDIA GB300 NVL72 datasheet (2025): 360 PFLOP/s with sparsity, 20 TB and 576 TB/s for 72",
    ),
    Chip(
        "B300", r"\bB300\b", 2250e12, 4500e12, 288 * _GB, 8000 * _GB, 148, 900 * _GB, 1100,
        "NVIDIA HGX B300 datasheet (2025): 36 PFLOP/s with sparsity for eight",
    ),
    Chip(
        "L4", r"\bL4\b", 121e12, 242.5e12, 24 * _GB, 300 * _GB, 58, 32 * _GB, 72,
        "NVIDIA L4 datasheet (2023): 242 TFLOP/s with sparsity; PCIe 4",
    ),
    Chip(
        "L40", r"\bL40\b", 181.05e12, 362e12, 48 * _GB, 864 * _GB, 142, 32 * _GB, 300,
        "NVIDIA L40 datasheet (2023): 181.05 | 362.1 TFLOP/s; PCIe 4",
    ),
    Chip(
        "L40S", r"\bL40S\b", 362.05e12, 733e12, 48 * _GB, 864 * _GB, 142, 32 * _GB, 350,
        "NVIDIA L40S datasheet (2023): 362.05 | 733 TFLOP/s; PCIe 4",
    ),
    # The 4090 D and the laptop part are slower chips.
    Chip(
        "RTX-4090", r"\bRTX[- ]4090\b(?! (?:D|Laptop)\b)", 165.2e12, 330.3e12, 24 * _GB, 1008 * _GB, 128, 32 * _GB, 450,
        "NVIDIA Ada GPU architecture whitepaper, appendix A (2022): bf16 with fp32 accumulate; PCIe 4",
    ),
    Chip(
        "RTX-5090", r"\bRTX[- ]5090\b(?! (?:D|Laptop)\b)", 209.5e12, 419e12, 32 * _GB, 1792 * _GB, 170, 64 * _GB, 575,
        "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A (2025): bf16 with fp32 accumulate; PCIe 5",
    ),
    Chip(
        "RTX-6000-Ada", r"\bRTX[- ]6000[- ]Ada\b", 364.2e12, 728.5e12, 48 * _GB, 960 * _GB, 142, 32 * _GB, 300,
        "NVIDIA RTX 6000 Ada datasheet (2023): 1,457 TFLOP/s of fp8 with sparsity; PCIe 4",
    ),
    Chip(
        "RTX-3090", r"\bRTX[- ]3090\b(?! Ti\b)", 71e12, None, 24 * _GB, 936 * _GB, 82, 32 * _GB, 350,
        "NVIDIA Ampere GA102 whitepaper, appendix A (2021): bf16 with fp32 accumulate; PCIe 4",
    ),
    # A device is one die of the two of a board.
    Chip(
        "MI250X", r"\bMI250X\b(?! */)", 191.5e12, None, 64 * _GIB, 1638 * _GB, 110, 200 * _GB, 280,
        "AMD Instinct MI250X data sheet (2021): 383 TFLOP/s, 128 GB, 3.2 TB/s and 560 W for two dies",
    ),
    Chip(
        "MI250", r"\bMI250\b", 181.05e12, None, 64 * _GIB, 1638 * _GB, 104, 150 * _GB, 280,
        "AMD Instinct MI250 data sheet (2021): 362.1 TFLOP/s, 128 GB, 3.2 TB/s and 560 W for two dies",
    ),
    Chip(
        "MI210", r"\bMI210\b", 181e12, None, 64 * _GIB, 1638 * _GB, 104, 150 * _GB, 300,
        "AMD Instinct MI210 data sheet (2022): 181.0 TFLOP/s",
    ),
    Chip(
        "MI300A", r"\bMI300A\b", 980.6e12, 1961.2e12, 128 * _GB, 5300 * _GB, 228, 384 * _GB, 760,
        "AMD Instinct MI300A data sheet (2023): 980.6 TFLOP/s",
    ),
    Chip(
        "MI300X", r"\bMI300X\b", 1307.4e12, 2614.9e12, 192 * _GB, 5300 * _GB, 304, 448 * _GB, 750,
        "AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOP/s",
    ),
    Chip(
        "MI325X", r"\bMI325X\b", 1307.4e12, 2614.9e12, 256 * _GB, 6000 * _GB, 304, 448 * _GB, 1000,
        "AMD Instinct MI325X data sheet (2024): 1,307.4 TFLOP/s",
    ),
    Chip(
        "MI350X", r"\bMI350X\b", 2306.9e12, 4613.7e12, 288 * _GB, 8000 * _GB, 256, 537 * _GB, 1000,
        "AMD Instinct MI350X data sheet (2025): 2,306.9 TFLOP/s",
    ),
    Chip(
        "MI355X", r"\bMI355X\b", 2516.6e12, 5033.2e12, 288 * _GB, 8000 * _GB, 256, 537 * _GB, 1400,
        "AMD Instinct MI355X data sheet (2025): 2,516.6 TFLOP/s",
    ),
    Chip(
        "TPUv4", r"\bTPU ?v4\b", 275e12, None, 32 * _GIB, 1200 * _GB, 2, 100 * _GB, 192,
        "Jouppi et al. 2023, table 4",
    ),
)  # fmt: skip


_PART: Final = re.compile(r"\bMIG\b|-\d+[ABCQ]$")
"""In the names of parts of a chip: of MIG, as `MIG 1g.5gb`, and of virtual GPUs, as `A40-48Q`."""


def find_chip(device_name: str) -> Chip | None:
    """Return the chip that a device's name means; None where none is known, and for a part of a chip."""
    if _PART.search(device_name):
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_name, re.IGNORECASE)), None)


def chip_named(name: str) -> Chip:
    """Return the chip called `name` here, or the one that a device's name means.

    Raises:
        ValueError: there is none.
    """
    chip = next((chip for chip in CHIPS if chip.name.lower() == name.lower()), None) or find_chip(name)
    if chip is None:
        # by the first word too: H1000 is nearer to H100-SXM than to H800
        names = {word: chip.name for chip in CHIPS for word in (chip.name.split("-")[0].lower(), chip.name.lower())}
        nearest = names[difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]]
        known = ", ".join(chip.name for chip in CHIPS)
        raise ValueError(f"chip {name!r} is not known; the nearest is {nearest!r}, of {known}")
    return chip


@dataclass(frozen=True)
class Peak:
    """What an MFU is a share of.

    Attributes:
        flops: FLOP/s of one device; None: not known, and there is no MFU.
        words: which peak it is, such as "H100-SXM's 989.5 TFLOP/s bfloat16"; or why there is none.
        source: the datasheet or calibration; "" without a peak.
    """

    flops: float | None
    words: str
    source: str = ""

    @classmethod
    def of(cls, name: str, flops: float, dtype: str, source: str) -> "Peak":
        """Return a peak that is known, in words."""
        return cls(flops, f"{name}'s {flops / 1e12:,.5g} TFLOP/s {dtype}", source)


def peak_of(device_name: str, dtype: str) -> Peak:
    """Return the dense matrix peak of one device, or why it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` prints it, such as "NVIDIA H100 80GB HBM3"; any CPU gives None.
        dtype: compute type as the run spec names it. In float32 it depends on whether TF32 was allowed, so an MFU would
            be a guess: None.
    """
    chip = find_chip(device_name)
    flops = None if chip is None or dtype not in ("bfloat16", "float16") else chip.peak(dtype)
    if chip is None:
        what = "a part of a GPU" if _PART.search(device_name) else "not in the table of datasheets"
        return Peak(
            None, f"{device_name} is {what}; give its peak by trimaran calibrate --output FILE, then --chip FILE"
        )
    if flops is None:
        why = "TF32 or not is not told" if dtype == "float32" else "its datasheet has none"
        return Peak(None, f"no peak of {chip.name} is known in {dtype}: {why}")
    return Peak.of(chip.name, flops, dtype, chip.source)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return `peak_of`'s FLOP/s, None where they are not known."""
    return peak_of(device_name, dtype).flops
