"""Compile every kernel configuration that ships, for chips that need not be here, and print what they take.

    python benchmarks/compile_kernels.py [--chip sm_90] [--op activation] [--markdown benchmarks/KERNELS.md]

A case calls an op on tensors of the meta device, forward and backward, so that what is compiled is what a GPU would
run. Exits with 1 where a kernel spills, uses a stack or asks for more shared memory than the chip has.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from trimaran.kernels import activation, adamw, cross_entropy, decode, dropout, norm, rotary
from trimaran.kernels.ahead_of_time import SHARED_LIMIT_BYTES, CompiledKernel, compiling_for
from trimaran.kernels.attention import AttentionDropout, AttentionOptions, Documents, triton_attention

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "generic": 86}
"""Tuned table -> the architecture that it is compiled for. The generic table serves all other chips: 8.6 has the least
shared memory of them."""


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
    backward(
        activation.triton_geglu(meta(4096, 2 * 11008, dtype=torch.float32))
    )  # float32 takes the most registers here


def _cross_entropy() -> None:
    rows, width, num_real = 2048, 50304, 50257
    labels, normalizer = torch.empty(rows, dtype=torch.int64, device="meta"), torch.empty(2, rows, device="meta")
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.empty(rows, width, dtype=dtype, device="meta")
        for with_sum in (False, True):
            statistics = cross_entropy.triton_local_statistics_(logits, labels, 0, num_real, with_sum)
        cross_entropy.triton_logits_gradient_(logits, labels, 0, num_real, statistics, normalizer, num_real)


def _rotary() -> None:
    def run(
        op: Callable[..., Tensor], num_heads: int, head_dim: int, rot: int, dtype: torch.dtype, interleaved: bool
    ) -> None:
        cos, sin = (torch.empty(4096, rot // 2, dtype=dtype, device="meta") for _ in range(2))
        backward(op(meta(2, 4096, num_heads, head_dim, dtype=dtype) * 1.0, cos, sin, interleaved))

    for interleaved in (False, True):
        run(rotary.triton_rotary, 32, 128, 128, torch.bfloat16, interleaved)
        run(rotary.triton_rotary, 32, 128, 32, torch.bfloat16, interleaved)
        run(rotary.triton_rotary_, 1, 128, 128, torch.float32, interleaved)


def _dropout() -> None:
    where = {"seed": 1, "site": "layers.0.mlp.output", "first_sample": 0, "first_position": 0, "seq_len": 4096}
    for hidden, dtype in ((4096, torch.bfloat16), (4097, torch.bfloat16), (4096, torch.float32)):
        x, residual = (meta(2, 4096, hidden, dtype=dtype) for _ in range(2))
        backward(dropout.triton_dropout_add(x, residual, 0.1, **where))


def _adamw() -> None:
    tensors = [torch.empty(2**26, device="meta") for _ in range(4)]
    for copy in (None, torch.empty(2**26, dtype=torch.bfloat16, device="meta")):
        state = adamw.AdamWState(*tensors, torch.empty((), device="meta"), copy)
        adamw.triton_adamw_([state], lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def _decode() -> None:
    def call(
        head_dim: int,
        batch: int = 2,
        q_len: int = 1,
        page: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        cache = meta(4096 if page else batch, page or 32768, 8, head_dim, dtype=dtype)
        table = meta(batch, 32768 // page, dtype=torch.int32) if page else None
        lengths = meta(batch, dtype=torch.int32)
        decode.triton_decode_attention(
            meta(batch, q_len, 32, head_dim, dtype=dtype), cache, cache, lengths, block_table=table, **options
        )
        if head_dim == 128 and not options and dtype == torch.bfloat16:
            new = meta(batch, q_len, 8, head_dim, dtype=dtype)
            decode.triton_append_to_cache_(cache, cache, new, new, lengths, block_table=table)

    options = {"window": 4096, "softcap": 50.0, "alibi_slopes": meta(32, dtype=torch.float32)}
    call(64, batch=128)  # so many samples that nothing is split
    call(128)
    call(128, page=16)
    call(256)
    for head_dim in (64, 128, 256):
        call(head_dim, q_len=8, page=16, **options)
    for head_dim in (16, 32):
        call(head_dim)
        call(head_dim, q_len=8)
    for head_dim in (16, 32, 64, 128, 256):
        call(head_dim, batch=128, dtype=torch.float32)


def _attend(
    head_dim: int, dtype: torch.dtype, *, deterministic: bool = True, packed: bool = False, extras: bool = False
) -> None:
    """Compile attention, both passes: causal, with all that plain configurations serve, or with every extra."""
    q = meta(2, 4096, 16, head_dim, dtype=dtype)
    k, v = (meta(2, 4096, 4, head_dim, dtype=dtype) for _ in range(2))
    options = AttentionOptions(
        window=1000 if packed else None, softcap=30.0 if extras else None, deterministic=deterministic
    )
    slopes = torch.empty(16, device="meta") if packed else None
    documents = Documents(torch.empty(9, dtype=torch.int32, device="meta"), longest=4096) if packed else None
    drop = AttentionDropout(0.1, (1, 2), first_sample=0, first_head=0, total_heads=16) if extras else None
    backward(triton_attention(q, k, v, options, slopes=slopes, documents=documents, dropout=drop))


def _attention() -> None:
    for head_dim in (64, 128, 256):
        _attend(head_dim, torch.bfloat16, packed=True)
    _attend(128, torch.bfloat16)
    for head_dim in (64, 128):
        _attend(head_dim, torch.bfloat16, deterministic=False, packed=True)


def _attention_extras() -> None:
    for head_dim in (64, 128, 256):
        _attend(head_dim, torch.bfloat16, packed=True, extras=True)
    for head_dim in (64, 128):
        _attend(head_dim, torch.bfloat16, deterministic=False, packed=True, extras=True)
    _attend(80, torch.float16)  # padded to 128
    _attend(96, torch.bfloat16, packed=True, extras=True)


def _attention_float32() -> None:
    for head_dim in (64, 128, 256):
        _attend(head_dim, torch.float32, packed=True, extras=True)


def _norm() -> None:
    def pair(hidden: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        x, residual = (meta(4096, hidden, dtype=dtype) for _ in range(2))
        return x, residual

    def vector(hidden: int) -> Tensor:
        return meta(hidden, dtype=torch.float32)  # as mixed precision may keep them; takes more registers than bfloat16

    for hidden in (1024, 16384, 32768):
        backward(*norm.triton_add_rms_norm(*pair(hidden), vector(hidden), 1e-5))
    backward(*norm.triton_add_rms_norm(*pair(65536, torch.float32), vector(65536), 1e-5))
    for hidden in (4096, 8192, 16384, 65536):
        backward(*norm.triton_add_layer_norm(*pair(hidden), vector(hidden), vector(hidden), 1e-5))


CASES: dict[str, Callable[[], None]] = {
    "activation": _activation,
    "adamw": _adamw,
    "attention": _attention,
    "attention_extras": _attention_extras,
    "attention_float32": _attention_float32,
    "cross_entropy": _cross_entropy,
    "decode": _decode,
    "dropout": _dropout,
    "norm": _norm,
    "rotary": _rotary,
}
"""op -> a function that starts each of its kernels in each configuration that ships."""


def compile_all(chip: str, ops: list[str]) -> list[CompiledKernel]:
    """Return the kernels of `ops`, compiled for `chip`."""
    with compiling_for(CHIPS[chip]) as kernels:
        for op in ops:
            CASES[op]()
    return kernels


def faults(kernel: CompiledKernel) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel."""
    if kernel.stack_bytes:
        yield f"a stack of {kernel.stack_bytes} bytes: it spills"
    if kernel.shared_bytes > SHARED_LIMIT_BYTES[kernel.arch]:
        yield f"{kernel.shared_bytes} bytes of shared memory, over the chip's {SHARED_LIMIT_BYTES[kernel.arch]}"


def row(kernel: CompiledKernel) -> str:
    """Return a kernel's row of the table."""
    matrix = ", ".join(f"{count} {name}" for name, count in kernel.matrix_instructions.items()) or "-"
    numbers = f"{kernel.registers} | {kernel.stack_bytes} | {kernel.shared_bytes}"
    return f"| sm_{kernel.arch} | {kernel.name} | {kernel.constants} | {numbers} | {matrix} |"


def header() -> list[str]:
    """Return the lines above the table: what was compiled, by what and when."""
    command = f"python benchmarks/compile_kernels.py {' '.join(sys.argv[1:])}".strip()
    made_by = (
        f"Triton {triton.__version__} and the ptxas in it, {date.today().isoformat()}. "
        "No GPU was there: this says what fits, not how fast it is."
    )
    return ["# What the kernels take", "", "```bash", command, "```", "", made_by, ""]


def main() -> int:
    """Compile, print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip; may be repeated")
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    lines = [
        "| chip | kernel | configuration | registers | stack bytes | shared bytes | matrix instructions |",
        "|" + "---|" * 7,
    ]
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
        args.markdown.write_text("\n".join([*header(), *lines]) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
