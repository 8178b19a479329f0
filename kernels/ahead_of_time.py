"""Ops without their GPU: on meta tensors they take the code path of a chip that is absent, and compute nothing.

Inside `compiling_for(arch)` every Triton launch compiles for that chip, which tells registers, stack, shared memory and
matrix instructions. Inside `skipping_launches(arch)` it does nothing: what is left of an op is the memory it takes.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
"""Most shared memory of one block (CUDA programming guide, compute capabilities): 163 KiB, 99 KiB and 227 KiB."""


@dataclass(frozen=True)
class CompiledKernel:
    """The resources of one kernel that ptxas compiled.

    Args:
        constants: readable text: dtype of the first tensor, constexpr arguments, launch options.
        registers, stack_bytes: per thread; what does not fit the registers spills to the stack.
        shared_bytes: per block, static and dynamic.
        matrix_instructions: how many the PTX has, by name: wgmma (of a warp group, Hopper), tcgen05.mma (on tensor
            memory, Blackwell) or mma.
    """

    name: str
    arch: int
    constants: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]


class _AbsentGPU:
    """Stands in for Triton's driver: answers what Triton asks before a launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"absent sm_{self.target.arch}"  # only a key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(arch: int) -> Iterator[list[CompiledKernel]]:
    """Compile every Triton kernel launched inside instead of running it; yield the growing list, each kernel once.

    Args:
        arch: compute capability times ten, such as 90.
    Raises Triton's error for a kernel that does not compile. Must not be used in the interpreter's process.
    """
    found: list[CompiledKernel] = []
    seen: set[int] = set()
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            names = {param.name for param in self.params if param.is_constexpr} | {"num_warps", "num_stages"}
            dtypes = [str(arg.dtype).removeprefix("torch.") for arg in args if isinstance(arg, torch.Tensor)]
            constants = " ".join(
                [*dtypes[:1], *(_say(name, value) for name, value in options.items() if name in names)]
            )
            found.append(_inspect(kernel, self.fn.__name__.lstrip("_"), arch, constants))
        return kernel

    with _instead_of_launching(arch, compile_only):
        yield found


@contextmanager
def skipping_launches(arch: int) -> Iterator[None]:
    """Skip every Triton kernel launched inside, which must have meta tensors. Args as `compiling_for`."""
    with _instead_of_launching(arch, lambda *args, **options: None):
        yield


@contextmanager
def _instead_of_launching(arch: int, run: Callable[..., Any]) -> Iterator[None]:
    launch, had_driver = JITFunction.run, triton.runtime.driver._active
    triton.runtime.driver.set_active(_AbsentGPU(arch))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = had_driver


def _say(name: str, value: Any) -> str:
    """Return a constant as readable text; of a record of flags, the names of those that are set."""
    if not hasattr(value, "_asdict"):
        return f"{name}={value}"
    return "+".join(field for field, flag in value._asdict().items() if flag is True) or "plain"


def _inspect(kernel: Any, name: str, arch: int, constants: str) -> CompiledKernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    # PTX, not SASS: `cuobjdump -sass` takes as long as the compilation.
    found = re.findall(r"\s(wgmma|tcgen05\.mma|mma)\.", kernel.asm["ptx"])
    return CompiledKernel(
        name=name,
        arch=arch,
        constants=constants,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=int(kernel.metadata.shared) + numbers["SHARED"],
        matrix_instructions={instruction: found.count(instruction) for instruction in sorted(set(found))},
    )
