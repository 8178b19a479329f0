"""Hardware facts: peak FLOP/s of known accelerators, MFU, and a description of the machine that is safe to publish."""

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimaran.runtime.files import read_text
from trimaran.runtime.processes import usable_cores

# Dense 16-bit matrix peaks with 32-bit accumulation, in FLOP/s. Vendors print figures "with sparsity" that are twice
# these. bfloat16 and float16 have the same peak on every one of them. The first match wins, so a narrower name is
# before a wider one.
_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 datasheet (2021), SXM and PCIe alike; A800 differs by NVLink only
    (r"\bA[18]00\b", 312e12),
    # NVIDIA H100 datasheet (2023): NVL 1,671, PCIe 1,513, SXM 1,979 TFLOP/s with sparsity
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756.5e12),
    (r"\bH100\b", 989.5e12),
    # NVIDIA H200 datasheet (2024): NVL 1,671, SXM 1,979 TFLOP/s with sparsity
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200\b", 989.5e12),
    # NVIDIA HGX B200 datasheet (2025): 36 PFLOP/s with sparsity for eight
    (r"\bB200\b", 2250e12),
    # NVIDIA L40S datasheet (2023): 362.05 | 733 TFLOP/s
    (r"\bL40S\b", 362.05e12),
    # NVIDIA Ada GPU architecture whitepaper, appendix A (2022): bf16 with fp32 accumulate. The 4090 D and the laptop
    # part are slower chips
    (r"\bRTX 4090\b(?! (?:D|Laptop)\b)", 165.2e12),
    # AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOP/s
    (r"\bMI300X\b", 1307.4e12),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense matrix peak of one device in FLOP/s, or None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` prints it, such as "NVIDIA H100 80GB HBM3"; any CPU gives None.
        dtype: compute type as the run spec names it. Only "bfloat16" and "float16" have a peak here: in float32 it
            depends on whether TF32 was allowed, so an MFU would be a guess.
    """
    # a MIG slice has the name of the whole device but is a fraction of it
    if dtype not in ("bfloat16", "float16") or re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name, re.IGNORECASE)), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Return the model FLOPs utilization, a share in [0, 1]: useful FLOP/s over the peak of all devices.

    Chowdhery et al., "PaLM", appendix B, 2022. Recomputed activations do not count as useful.

    Args:
        tokens_per_second: of the whole run, all ranks together.
        flops_per_token: forward and backward, ``TransformerConfig.flops_per_token``.
        peak: FLOP/s of one device, from `peak_flops`; None gives None.
        world_size: number of devices.
    """
    return None if peak is None else tokens_per_second * flops_per_token / (peak * world_size)


def describe_machine(accelerators: Sequence[str] = ()) -> dict[str, str | int | None]:
    """Return the facts by which a report's reader can judge its speed, without names of persons, hosts or paths.

    Args:
        accelerators: device names of this machine; counted by name, none means a CPU run.

    Returns:
        cpu, cpu_cores (those this process may use), memory_bytes (None where unknown), accelerators, system, python,
            torch (None when not installed).
    """
    return {
        "cpu": _cpu_model(),
        "cpu_cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "accelerators": ", ".join(f"{list(accelerators).count(name)} x {name}" for name in dict.fromkeys(accelerators))
        or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _torch_version(),
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the marketing name of the CPU where Linux gives one, else the architecture."""
    try:
        found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", read_text(cpuinfo, errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _torch_version() -> str | None:
    # the package metadata gives it without importing torch, which takes seconds
    try:
        return version("torch")
    except PackageNotFoundError:
        return None
