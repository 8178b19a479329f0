"""Launches Triton kernels: says where they can run, finds the tuned configuration, and launches.

Tuned configurations are data: one table per chip under `kernels/tuned/`, with the date of the measurement (null: chosen
from the compiler's report of registers and shared memory). No code contains a tile size.
"""

import json
import math
from contextlib import nullcontext
from functools import cache
from importlib import resources
from typing import Any

import torch
import triton
from torch import Tensor

from trimaran.kernels.limits import TRITON_DTYPES

_CHIPS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
_DTYPES = tuple(getattr(torch, name) for name in TRITON_DTYPES)
# An H100's. It sizes the grid where no GPU is present: in ahead-of-time compilation and in the interpreter.
_MULTIPROCESSORS_OFF_DEVICE = 132


def interpreting() -> bool:
    """Return whether this process runs Triton kernels in the interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels can't run on this device and dtype, as the end of a sentence; None where they can."""
    if dtype not in _DTYPES:
        return f"they work in bfloat16, float16 and float32, not in {str(dtype).removeprefix('torch.')}"
    if interpreting():
        # Triton's interpreter computes in NumPy, which has no bfloat16: the results are wrong without an error.
        return "Triton's interpreter gets bfloat16 wrong; use float32 or float16" if dtype == torch.bfloat16 else None
    if device.type == "meta":
        return None
    if device.type != "cuda":
        return f"they need a GPU and this rank's device is {device.type}"
    if torch.version.hip is not None:
        return "they are verified for NVIDIA GPUs alone and this is a ROCm build of torch"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"they need compute capability 8.0 or newer and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def chip_of(device: torch.device) -> str:
    """Return the name of the tuned table for `device`."""
    if interpreting():
        return "interpreter"
    if device.type == "cuda":
        return _CHIPS.get(torch.cuda.get_device_capability(device), "generic")
    return _CHIPS.get(divmod(triton.runtime.driver.active.get_current_target().arch, 10), "generic")


@cache
def tuned_table(chip: str) -> dict[str, Any]:
    """Return the tuned table of a chip.

    Its form: {"chip", "ops": {op: {"measured": date or null, "configs": {key: {constant or launch option: value}}}}}.
    """
    text = (resources.files("trimaran.kernels") / "tuned" / f"{chip}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def tuned(op: str, device: torch.device, *keys: str) -> dict[str, int]:
    """Return the tuned configuration of `op` on `device`'s chip, under the first of `keys` that the table has."""
    chip = chip_of(device)
    entries = tuned_table(chip)["ops"][op]["configs"]
    for key in keys:
        if key in entries:
            return dict(entries[key])
    raise KeyError(f"kernels/tuned/{chip}.json has none of {keys} for {op}; it has {sorted(entries)}")


def has_tuned(op: str, device: torch.device, key: str) -> bool:
    """Return whether `device`'s chip has a configuration of `op` under `key`."""
    return key in tuned_table(chip_of(device))["ops"].get(op, {"configs": {}})["configs"]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` (a `triton.jit` function) over `grid`; do nothing for an empty grid.

    Args:
        constants: the kernel's constexpr arguments and launch options (num_warps, num_stages) by name.
    """
    if math.prod(grid) == 0:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, even if the tensors are on another one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Fuse a * b + c into one instruction. Explicit because Triton's default is about to change.
        kernel[grid](*args, enable_fp_fusion=True, **constants)


def multiprocessors(device: torch.device) -> int:
    """Return how many streaming multiprocessors `device` has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return _MULTIPROCESSORS_OFF_DEVICE


def rows_of(x: Tensor) -> Tensor:
    """Return x [..., n] as contiguous rows [rows, n]; a view where x is contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
