"""Compiling kernels for a chip that is not here, and reading what the compiler made of them: registers, stack, shared memory, matrix instructions.

Inside `compiling_for(arch)` every Triton launch compiles for that chip and launches nothing, so that an op called on
tensors of the meta device goes through the very code that starts it on a GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}
"""Shared memory one block may have (CUDA programming guide, compute capabilities): 163 KiB, 99 KiB and 227 KiB."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as ptxas made it.

    Args:
        constants: for people, the dtype of its first tensor, its constexpr arguments and launch options.
        registers, stack_bytes: a thread; what does not fit the registers spills to the stack.
        shared_bytes: static and dynamic, a block.
        matrix_instructions: in PTX, by name: wgmma (a warp group's, on Hopper), tcgen05.mma (on tensor memory, on
            Blackwell) or mma.
    """

    name: str
    arch: int
    constants: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]


class _AbsentGPU:
    """What Triton asks of its driver before a launch."""

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
    """Compile, and do not launch, every Triton kernel that is started inside; yields the list that fills with them, each once.

    Args:
        arch: compute capability times ten, such as 90.
    Raises what Triton raises for a kernel that does not compile. Not for the interpreter's process.
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

    had_driver = triton.runtime.driver._active
    triton.runtime.driver.set_active(_AbsentGPU(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = had_driver


def _say(name: str, value: Any) -> str:
    """A constant for people; of a record of flags those that are set."""
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
    # `cuobjdump -sass` would show the instructions themselves, and take as long as compiling.
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
