"""What one rank measures: products, copies, attention, and steps of this runtime on small models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trimaran.kernels.dispatch import choose_kernels
from trimaran.models.batch import Microbatch
from trimaran.models.transformer import model_dtype
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.plan.calibrate.record import Point, What
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.calibration.clock import Timing, time_for
from trimaran.runtime.train.train_context import accumulate, build_train_context, finish_step

HEAD_DIMS: Final = (64, 128)
_ENDS, _LAYERS = 1, 3  # layers of the two models whose difference is that of layers alone


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        products: m, n and k.
        copies: bytes.
        attention: seq and heads, at every head size.
        models: hidden, ffn, vocab, seq and microbatch, of one layer and of three.
        exchanges: bytes of a rank's tensor.
        budget_s: seconds of a point.
        limit_s: seconds after which a process that measures by itself gives up.
    """

    products: Sequence[tuple[int, int, int]]
    copies: Sequence[int]
    attention: Sequence[tuple[int, int]]
    models: Sequence[tuple[int, int, int, int, int]]
    exchanges: Sequence[int]
    budget_s: float
    limit_s: float = 45.0


CPU: Final = Effort(
    products=(
        (128, 128, 128), (512, 256, 256), (512, 768, 256), (512, 256, 704), (512, 2048, 128), (256, 704, 512),
        (1024, 1024, 1024), (2048, 512, 64), (512, 8192, 256), (64, 1024, 1024), (512, 384, 256),
    ),
    copies=(1 << 16, 1 << 20, 1 << 24, 1 << 26),
    attention=((128, 4), (256, 8), (512, 4)),
    models=((64, 128, 512, 64, 1), (256, 704, 512, 256, 2), (512, 1408, 512, 128, 1), (256, 704, 8192, 256, 1)),
    exchanges=(1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 23),
    budget_s=0.15,
)  # fmt: skip
SMOKE: Final = Effort(
    products=((64, 64, 64), (128, 64, 128), (64, 128, 256)), copies=(1 << 12, 1 << 16), attention=((32, 2),),
    models=((64, 64, 512, 16, 1), (64, 64, 512, 64, 1)), exchanges=(1 << 10, 1 << 16), budget_s=0.002, limit_s=5.0,
)  # fmt: skip
"""To see that everything runs; its figures mean nothing."""
GPU: Final = Effort(
    products=(
        (1024, 1024, 1024), (4096, 4096, 512), (4096, 4096, 1024), (4096, 4096, 4096), (8192, 8192, 8192),
        (2048, 12288, 4096), (4096, 14336, 4096), (4096, 4096, 14336), (4096, 14400, 1800), (4096, 32000, 4096),
        (16384, 8192, 1024),
    ),
    copies=(1 << 20, 1 << 24, 1 << 28, 1 << 30),
    attention=((1024, 32), (2048, 32), (4096, 32), (8192, 16)),
    models=(
        (256, 512, 512, 128, 1), (2048, 5632, 512, 2048, 1), (4096, 11008, 512, 2048, 1), (2048, 5632, 32000, 2048, 1),
    ),
    exchanges=(1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27),
    budget_s=0.2,
)  # fmt: skip


def measure(device: torch.device, dtypes: Sequence[str], ranks: int, effort: Effort) -> Iterator[Point]:
    """Yield the points of this rank, with torch's number of threads as it is. No communication.

    Args:
        ranks: that do this at once.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def point(what: What, dtype: str, shape: dict[str, int], found: Timing, operation: str = "") -> Point:
        return Point(
            what=what, dtype=dtype, ranks=ranks, threads=threads, shape=shape, operation=operation,
            seconds=found.seconds, cpu_seconds=found.cpu_seconds, spread=found.spread, repeats=found.repeats,
        )  # fmt: skip

    budget = effort.budget_s
    for size in effort.copies:
        yield point("copy", "float32", {"bytes": size}, time_for(_copy(size, device), device, budget))
    for dtype in dtypes:
        torch_dtype = model_dtype(dtype)
        for m, n, k in effort.products:
            found = time_for(_product(m, n, k, device, torch_dtype), device, budget)
            yield point("product", dtype, {"m": m, "n": n, "k": k}, found)
        for head_dim in HEAD_DIMS:
            for seq, heads in effort.attention:
                shape = {"seq": seq, "heads": heads, "head_dim": head_dim}
                for name, work in _attention(device, torch_dtype, **shape):
                    yield point("attention", dtype, shape, time_for(work, device, budget), name)
        for model in effort.models:
            for layers in (_ENDS, _LAYERS):
                spec = spec_of(model, layers, dtype)
                shape = {
                    **dict(zip(("hidden", "ffn", "vocab", "seq", "microbatch"), model, strict=True)),
                    "layers": layers, "heads": spec.transformer.num_heads,
                }  # fmt: skip
                step, update, elements = _step(spec, device)
                yield point("step", dtype, shape, time_for(step, device, 2 * budget))
                yield point("update", dtype, {"elements": elements}, time_for(update, device, budget))


def spec_of(model: tuple[int, int, int, int, int], layers: int, dtype: str) -> RunSpec:
    """Return the spec of a small LLaMA with heads of 64."""
    hidden, ffn, vocab, seq, microbatch = model
    return parse_spec(
        {
            "model": {
                "num_layers": layers, "hidden_size": hidden, "num_heads": max(1, hidden // 64),
                "ffn_hidden_size": ffn, "vocab_size": vocab,
            },
            "data": {"tokenizer_vocab_size": vocab},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": dtype},
            "train": {
                "num_steps": 1, "global_batch_size": microbatch, "micro_batch_size": microbatch, "seq_len": seq,
            },
        }
    )  # fmt: skip


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _product(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a product as a linear layer has it: [m, k] x [n, k], transposed."""
    a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b.t(), out=out)


def _attention(
    device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    kernels, _ = choose_kernels("auto", device, dtype, head_dim)
    q, k, v = (torch.randn(1, seq, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    yield "forward", lambda: kernels.attention(q.detach(), k.detach(), v.detach())
    gradient = torch.randn(1, seq, heads, head_dim, device=device, dtype=dtype)

    def both() -> None:
        torch.autograd.grad(kernels.attention(q, k, v), (q, k, v), gradient)

    yield "both", both


def _step(spec: RunSpec, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], object], int]:
    """Return a step's forwards and backwards, its update, and the elements that the update changes."""
    train, context = spec.train, build_train_context(spec, lone_mesh(), device)
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.int64, device=device)
    targets = spec.target_tokens_per_step

    def step() -> Tensor:
        return accumulate(context, [Microbatch(tokens, tokens, 0)], targets)

    def update() -> None:
        finish_step(context, [1.0, 1.0, 0.0, 0.0], 1e-5, targets)

    return step, update, spec.transformer.num_parameters()
