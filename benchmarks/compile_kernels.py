"""Compile every kernel configuration that ships, for chips that need not be here, and print what they take.

    python benchmarks/compile_kernels.py [--chip sm_90] [--op activation] [--markdown benchmarks/KERNELS.md]

A case calls an op on tensors of the meta device, forward and backward, so that what is compiled is what a GPU would run. Exits with 1 where a kernel
spills, uses a stack or asks for more shared memory than the chip has.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from trimaran.kernels import activation
from trimaran.kernels.ahead_of_time import SHARED_LIMIT_BYTES, CompiledKernel, compiling_for

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor with a shape and no data, that wants a gradient."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def backward(*outputs: Tensor) -> None:
    """Run the backward pass of `outputs`."""
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def _activation() -> None:
    for op in (activation.triton_gelu, activation.triton_gelu_tanh):
        backward(op(meta(4096, 16384, dtype=torch.bfloat16)))
    for op in (activation.triton_swiglu, activation.triton_geglu, activation.triton_geglu_tanh):
        backward(op(meta(4096, 2 * 11008, dtype=torch.bfloat16)))
    backward(activation.triton_geglu(meta(4096, 2 * 11008, dtype=torch.float32)))  # float32 takes the most registers here


CASES: dict[str, Callable[[], None]] = {"activation": _activation}
"""op -> a function that starts each of its kernels in each configuration that ships."""


def compile_all(chip: str, ops: list[str]) -> list[CompiledKernel]:
    """Return the kernels of `ops`, compiled for `chip`."""
    with compiling_for(CHIPS[chip]) as kernels:
        for op in ops:
            CASES[op]()
    return kernels


def faults(kernel: CompiledKernel) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel."""
    if kernel.stack_bytes or kernel.spills:
        yield f"stack of {kernel.stack_bytes} bytes and {kernel.spills} spill instructions"
    if kernel.shared_bytes > SHARED_LIMIT_BYTES[kernel.arch]:
        yield f"{kernel.shared_bytes} bytes of shared memory, over the chip's {SHARED_LIMIT_BYTES[kernel.arch]}"


def row(kernel: CompiledKernel) -> str:
    """Return a kernel's row of the table."""
    matrix = ", ".join(f"{count} {name}" for name, count in kernel.tensor_instructions.items()) or "-"
    numbers = f"{kernel.registers} | {kernel.stack_bytes} | {kernel.spills} | {kernel.shared_bytes}"
    return f"| sm_{kernel.arch} | {kernel.name} | {kernel.constants} | {numbers} | {matrix} |"


def main() -> int:
    """Compile, print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip; may be repeated")
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    lines = ["| chip | kernel | configuration | registers | stack | spills | shared bytes | matrix instructions |", "|" + "---|" * 8]
    print("\n".join(lines), flush=True)
    wrong = 0
    for chip in args.chip or CHIPS:
        for op in args.op or CASES:
            for kernel in compile_all(chip, [op]):
                lines.append(row(kernel))
                print(lines[-1], flush=True)
                for fault in faults(kernel):
                    wrong += 1
                    print(f"{kernel.name} {kernel.constants}: {fault}", file=sys.stderr)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
