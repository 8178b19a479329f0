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
        flops: dense peak in FLOP/s of bfloat16 and float16, which are equal on all of these.
        flops_8_bit: of fp8; None: it has none.
        memory_bytes: of the device's memory, whole.
        memory_rate: bytes a second.
        processors: that share out a product's tiles: streaming multiprocessors, or compute units.
        link_rate: bytes a second and direction to the other chips of a node; 0: there is no such link.
        watts: board power.
        source: the datasheet.
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

    def peak(self, dtype: str) -> float | None:
        """Return the dense matrix peak in FLOP/s for a compute type; None where it is not known."""
        return {"bfloat16": self.flops, "float16": self.flops, "fp8": self.flops_8_bit}.get(dtype)


# Vendors print figures "with sparsity" that are twice these. A narrower pattern is before a wider one.
CHIPS: Final = (
    Chip(
        "A100-40GB", r"\bA100\b.*\b40GB\b", 312e12, None, 40 * _GIB, 1555 * _GB, 108, 300 * _GB, 400,
        "NVIDIA A100 datasheet (2021), SXM; the peak of PCIe is the same",
    ),
    Chip(
        "A800", r"\bA800\b", 312e12, None, 80 * _GIB, 2039 * _GB, 108, 200 * _GB, 400,
        "as A100, with 400 GB/s NVLink",
    ),
    Chip(
        "A100-80GB", r"\bA100\b", 312e12, None, 80 * _GIB, 2039 * _GB, 108, 300 * _GB, 400,
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
        "H800", r"\bH800\b", 989.5e12, 1979e12, 80 * _GIB, 3350 * _GB, 132, 200 * _GB, 700,
        "as H100, with 400 GB/s NVLink",
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
        "B200", r"\bB200\b", 2250e12, 4500e12, 180 * _GB, 7700 * _GB, 148, 900 * _GB, 1000,
        "NVIDIA HGX B200 datasheet (2025): 36 PFLOP/s with sparsity for eight",
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
        "MI300X", r"\bMI300X\b", 1307.4e12, 2614.9e12, 192 * _GB, 5300 * _GB, 304, 448 * _GB, 750,
        "AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOP/s",
    ),
    Chip(
        "TPUv4", r"\bTPU ?v4\b", 275e12, None, 32 * _GIB, 1200 * _GB, 2, 100 * _GB, 192,
        "Jouppi et al. 2023, table 4",
    ),
)  # fmt: skip


def find_chip(device_name: str) -> Chip | None:
    """Return the chip that a device's name means; None where none is known, and for a part of a chip (MIG)."""
    if re.search(r"\bMIG\b", device_name):
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


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense matrix peak of one device in FLOP/s, or None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` prints it, such as "NVIDIA H100 80GB HBM3"; any CPU gives None.
        dtype: compute type as the run spec names it. In float32 it depends on whether TF32 was allowed, so an MFU would
            be a guess: None.
    """
    chip = find_chip(device_name)
    return None if chip is None or dtype not in ("bfloat16", "float16") else chip.peak(dtype)
