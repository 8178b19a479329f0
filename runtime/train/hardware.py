"""MFU, and a description of the machine that is safe to publish."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimaran.runtime.files import read_text
from trimaran.runtime.processes import usable_cores


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Return the model FLOPs utilization, a share in [0, 1]: useful FLOP/s over the peak of all devices.

    Chowdhery et al., "PaLM", appendix B, 2022. Recomputed activations do not count as useful.

    Args:
        tokens_per_second: of the whole run, all ranks together.
        flops_per_token: forward and backward, ``TransformerConfig.flops_per_token``.
        peak: FLOP/s of one device, from `runtime.plan.chips.peak_flops`; None gives None.
        world_size: number of devices.
    """
    return None if peak is None else tokens_per_second * flops_per_token / (peak * world_size)


def describe_machine(accelerators: Sequence[str] = ()) -> dict[str, str | int | None]:
    """Return the facts by which a report's reader can judge its speed, without names of persons, hosts or paths.

    Args:
        accelerators: device names of this machine; counted by name, none means a CPU run.

    Returns:
        cpu, cpu_cores (those this process may use), memory_bytes, accelerators, system, python,
            torch (None when not installed).
    """
    import psutil  # 15 ms, which only the rank that describes the machine needs

    return {
        "cpu": _cpu_model(),
        "cpu_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": ", ".join(f"{list(accelerators).count(name)} x {name}" for name in dict.fromkeys(accelerators))
        or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _torch_version(),
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the marketing name of the CPU where Linux gives one, else the architecture.

    py-cpuinfo finds the same name in this file, but counts the processor's frequency first, in a process of its own:
    1.2 s against 0.1 ms.
    """
    try:
        found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", read_text(cpuinfo, errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _torch_version() -> str | None:
    # the package metadata gives it without importing torch, which takes seconds
    try:
        return version("torch")
    except PackageNotFoundError:
        return None
