"""The preflight of a node's GPUs: each one's product, memory and error counters, and NCCL between all of them."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_MATRIX = 1024
_PRODUCTS = 20  # the best of them counts: other programs may use the node meanwhile
_LARGEST = 4  # of the matrices' whole numbers: their products are exact in every format that a GPU may compute in
_RING_NUMBERS = 1 << 20
_ANSWER_S = 60


@dataclass(frozen=True)
class GpuFacts:
    """What a preflight finds about one GPU.

    Args:
        index: among those of the node.
        gflops: of a float32 matrix product.
        free_gib, total_gib: memory.
        ecc_errors: uncorrected memory errors since the driver was loaded, None where they are not counted.
        retires_pages: whether memory waits to be taken out of use at the next reset.
        problem: what could not be done at all, "" for nothing.
    """

    index: int
    name: str
    gflops: float = 0.0
    free_gib: float = 0.0
    total_gib: float = 0.0
    ecc_errors: int | None = None
    retires_pages: bool = False
    problem: str = ""

    def faults(self) -> list[str]:
        """Return why this GPU should not be used, none if it is sound."""
        found = [self.problem] if self.problem else []
        if not self.problem and self.free_gib < 0.9 * self.total_gib:
            found.append(f"{self.free_gib:.1f} of {self.total_gib:.1f} GiB are free: another process uses it")
        if self.ecc_errors:
            found.append(f"{self.ecc_errors} uncorrected memory errors (ECC)")
        if self.retires_pages:
            found.append("memory waits for a reset to be taken out of use (retired_pages.pending)")
        return [f"GPU {self.index} ({self.name}): {fault}" for fault in found]


def look_at_gpus() -> list[GpuFacts]:
    """Return the facts about every GPU of this node."""
    counters = ecc_counters()
    return [_look_at(index, counters) for index in range(torch.cuda.device_count())]


def _look_at(index: int, counters: Mapping[str, tuple[int | None, bool]]) -> GpuFacts:
    name = "unknown"
    try:
        properties = torch.cuda.get_device_properties(index)
        name = properties.name
        free, total = torch.cuda.mem_get_info(index)
        ecc_errors, retires_pages = counters.get(str(properties.uuid).removeprefix("GPU-"), (None, False))
        gflops = matrix_gflops(torch.device("cuda", index))
        return GpuFacts(index, name, gflops, free / 2**30, total / 2**30, ecc_errors, retires_pages)
    except Exception as error:  # noqa: BLE001 - any problem of a GPU is a fact about it
        return GpuFacts(index, name, problem=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def matrix_gflops(device: torch.device) -> float:
    """Return the speed of a float32 matrix product on a device, the best of several.

    Raises:
        ArithmeticError: the product is wrong.
    """
    draw = torch.Generator().manual_seed(1)
    left, right = (
        torch.randint(-_LARGEST, _LARGEST + 1, (_MATRIX, _MATRIX), generator=draw).float().to(device) for _ in range(2)
    )
    best, product = float("inf"), left
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    ones = torch.ones(_MATRIX, dtype=torch.float64)
    expected = left.cpu().double() @ (right.cpu().double() @ ones)
    wrong = int((product.cpu().double() @ ones != expected).sum())
    if wrong:
        raise ArithmeticError(f"a matrix product is wrong in {wrong} of {_MATRIX} rows")
    return 2 * _MATRIX**3 / best / 1e9


def ecc_counters() -> dict[str, tuple[int | None, bool]]:
    """Return nvidia-smi's counters by the GPU's UUID: uncorrected errors, and whether pages wait for a reset.

    None at all where there is no nvidia-smi.
    """
    query = "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for line in shown.splitlines():
        uuid, errors, pending = (word.strip() for word in line.split(","))
        found[uuid.removeprefix("GPU-")] = int(errors) if errors.isdigit() else None, pending == "Yes"
    return found


def check_nccl_here() -> str:
    """Sum a buffer over all GPUs of this node by NCCL, in this one process; return what is wrong, "" for nothing."""
    count = torch.cuda.device_count()
    if count < 2:
        return ""
    try:
        buffers = [torch.full((_RING_NUMBERS,), float(index), device=f"cuda:{index}") for index in range(count)]
        torch.cuda.nccl.all_reduce(buffers)
        right = [bool((each == count * (count - 1) / 2).all()) for each in buffers]
    except RuntimeError as error:
        return f"NCCL between its {count} GPUs: {str(error).splitlines()[0]}"
    bad = [index for index, each in enumerate(right) if not each]
    return f"NCCL between its {count} GPUs: the sum is wrong on GPU {', '.join(map(str, bad))}" if bad else ""
