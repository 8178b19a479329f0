"""The ops as data: what is called with which inputs, for the comparison with the references and for the clock."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_bench.harness import Case, Draw, Run, placement, tensors
from torch import Tensor

from trimaran.kernels.adamw import AdamWState
from trimaran.kernels.attention import AttentionDropout, AttentionOptions, Documents, alibi_slopes
from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.kernels.dispatch import KernelSet
from trimaran.kernels.random import stream_key
from trimaran.models.parallel.vocab import head_loss

BATCH, EPS = 2, 1e-5
CHECK_SHAPES = {False: ((37, 1000), (64, 4096), (5, 10240)), True: ((5, 24),)}
"""Whether it is a smoke run -> (rows of each of the two samples, width)."""
DROPOUT = {"seed": 1, "site": "layers.0.mlp.output", "first_sample": 3, "first_position": 0}
ADAMW = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class MemoryOp:
    """An op whose time is that of reading and writing memory.

    Args:
        make: (draw, rows, width) -> inputs; the first is x [2, rows, width] or has as many elements.
        run: (kernels, *inputs) -> outputs.
        moved: bytes that must be read and written, forward and backward, over the bytes of the first input.
        widths: that are timed, with ROWS rows in all.
        variants: further runs of it, which are checked and not timed.
        liger: (Liger's functions, *inputs) -> (function, its inputs) that does the same.
        dtype: None for any.
    """

    make: Callable[..., list[Tensor]]
    run: Run
    moved: tuple[float, float]
    widths: tuple[int, ...] = (4096,)
    variants: dict[str, Run] | None = None
    liger: Callable[..., tuple[Run, list[Tensor]]] | None = None
    dtype: torch.dtype | None = None


def _x(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [draw(BATCH, rows, width)]


def _pair(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [draw(BATCH, rows, width), draw(BATCH, rows, width)]


def _rms(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [draw(BATCH, rows, width), draw(width)]


def _layer(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [*_rms(draw, rows, width), draw(width)]


def _add_rms(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [*_pair(draw, rows, width), draw(width)]


def _add_layer(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [*_pair(draw, rows, width), draw(width), draw(width)]


def _heads(draw: Draw, rows: int, width: int) -> list[Tensor]:
    head_dim = 128 if width % 128 == 0 else width // 4
    angles = draw(rows, head_dim // 2, std=3.0, grad=False)
    return [draw(BATCH, rows, width // head_dim, head_dim), angles.cos(), angles.sin()]


def _state(draw: Draw, rows: int, width: int) -> list[Tensor]:
    size = BATCH * rows * width
    copy_dtype = torch.float16 if draw.device.type == "cpu" else torch.bfloat16  # the interpreter gets bfloat16 wrong
    param, grad, exp_avg, root = (draw(size, grad=False) for _ in range(4))
    copy = torch.empty(size, dtype=copy_dtype, device=draw.device)
    return [param, grad, exp_avg, root.square(), torch.full((), 3.0, device=draw.device), copy]


def _adamw(kernels: KernelSet, *state: Tensor, **more: float) -> tuple[Tensor, ...]:
    kernels.adamw_([AdamWState(*state)], **ADAMW, **more)
    return (state[0], *state[2:])  # the gradient may change or not


def _partly(kernels: KernelSet, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1] // 2
    return kernels.rotary(x, cos[:, :half], sin[:, :half])


def _dropout(kernels: KernelSet, *inputs: Tensor) -> Tensor:
    op = kernels.dropout if len(inputs) == 1 else kernels.dropout_add
    return op(*inputs, 0.1, **DROPOUT, seq_len=inputs[0].shape[1])


def _activation(name: str) -> Run:
    return lambda kernels, x: kernels.activations[name](x)


def _liger_gated(name: str, library: Any, gate_up: Tensor) -> tuple[Run, list[Tensor]]:
    return getattr(library, name), [half.detach().contiguous().requires_grad_() for half in gate_up.chunk(2, dim=-1)]


def _liger_rope(library: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Run, list[Tensor]]:
    """Return Liger's rotary call: half of the heads are its queries, half its keys, [batch, heads, seq, head_dim].

    Its tables have the columns of both halves of a head.
    """
    parts = [part.detach().contiguous().requires_grad_().transpose(1, 2) for part in x.chunk(2, dim=2)]
    tables = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
    return library.liger_rope, [*parts, *tables]


MEMORY_OPS: dict[str, MemoryOp] = {
    "rms_norm": MemoryOp(
        _rms, lambda kernels, x, w: kernels.rms_norm(x, w, EPS), (2, 3), (4096, 8192),
        liger=lambda library, x, w: (partial(library.liger_rms_norm, eps=EPS), [x, w]),
    ),
    "layer_norm": MemoryOp(
        _layer, lambda kernels, x, w, b: kernels.layer_norm(x, w, b, EPS), (2, 3), (4096, 8192),
        {"without a bias": lambda kernels, x, w, b: kernels.layer_norm(x, w, None, EPS) + 0 * b},
        liger=lambda library, x, w, b: (lambda x, w, b: library.liger_layer_norm(x, w, b, EPS), [x, w, b]),
    ),
    "add_rms_norm": MemoryOp(
        _add_rms, lambda kernels, x, r, w: kernels.add_rms_norm(x, r, w, EPS), (4, 4), (4096, 8192)
    ),
    "add_layer_norm": MemoryOp(
        _add_layer, lambda kernels, x, r, w, b: kernels.add_layer_norm(x, r, w, b, EPS), (4, 4), (4096, 8192)
    ),
    "rotary": MemoryOp(
        _heads, lambda kernels, x, cos, sin: kernels.rotary(x, cos, sin), (2, 2),
        variants={
            "interleaved": lambda kernels, x, cos, sin: kernels.rotary(x, cos, sin, True),
            "in place": lambda kernels, x, cos, sin: kernels.rotary_(x * 1.0, cos, sin),
            "half of a head": _partly,
        },
        liger=_liger_rope,
    ),
    "swiglu": MemoryOp(
        _x, _activation("swiglu"), (1.5, 2.5), (2 * 11008,), liger=partial(_liger_gated, "liger_swiglu")
    ),
    "geglu": MemoryOp(_x, _activation("geglu"), (1.5, 2.5), (2 * 11008,)),
    "geglu_tanh": MemoryOp(
        _x, _activation("geglu_tanh"), (1.5, 2.5), (2 * 11008,), liger=partial(_liger_gated, "liger_geglu")
    ),
    "gelu": MemoryOp(_x, _activation("gelu"), (2, 3), (16384,), {"tanh": _activation("gelu_tanh")}),
    "dropout": MemoryOp(_x, _dropout, (2, 2)),
    "dropout_add": MemoryOp(_pair, _dropout, (3, 2)),
    # Parameter and both moments read and written, gradient read, a 16-bit copy written: 30 bytes for the parameter's 4.
    "adamw": MemoryOp(
        _state, _adamw, (7.5, 0), variants={"clipped": partial(_adamw, grad_factor=0.5)}, dtype=torch.float32
    ),
}  # fmt: skip
ROWS = 32768


def memory_cases(name: str, smoke: bool) -> list[Case]:
    """Return the comparisons of a memory-bound op."""
    op = MEMORY_OPS[name]
    runs = {"": op.run, **(op.variants or {})}
    dtypes = () if op.dtype is None else ((op.dtype,),)
    return [
        Case(f"{rows} x {width} {label}".strip(), partial(op.make, rows=rows, width=width), run, *dtypes)
        for rows, width in CHECK_SHAPES[smoke]
        for label, run in runs.items()
    ]


def attention_case(
    label: str,
    *,
    batch: int = 2,
    seq: int = 300,
    keys: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 64,
    alibi: bool = False,
    documents: tuple[int, ...] = (),
    dropout: float = 0.0,
    lse: bool = False,
    **options: Any,
) -> Case:
    """Return a call of attention.

    Args:
        alibi, documents (where they start in the batch's tokens), dropout: what goes beside the options.
        lse: whether the log-sum-exp is used.
        options: the fields of `AttentionOptions`.
    """
    keys, kv_heads = keys or seq, kv_heads or heads
    lengths = [stop - start for start, stop in zip(documents, [*documents[1:], batch * seq], strict=False)]

    def make(draw: Draw) -> list[Tensor]:
        q, k, v = draw(batch, seq, heads, head_dim), *(draw(batch, keys, kv_heads, head_dim) for _ in range(2))
        starts = torch.tensor([*documents, batch * seq], dtype=torch.int32, device=draw.device)
        return [q, k, v, torch.tensor(alibi_slopes(heads), device=draw.device), starts]

    def run(
        kernels: KernelSet, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, starts: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        more = {
            "slopes": slopes if alibi else None,
            "documents": Documents(starts, max(lengths)) if documents else None,
            "dropout": AttentionDropout(dropout, stream_key(3, "attention"), 2, 1, heads + 2) if dropout else None,
        }
        return (kernels.attention_with_lse if lse else kernels.attention)(q, k, v, AttentionOptions(**options), **more)

    return Case(label, make, run, deterministic=options.get("deterministic", True))


def attention_cases(smoke: bool) -> list[Case]:
    """Return the comparisons of attention: every width of a head, then every option."""
    size: dict[str, Any] = {"batch": 1, "seq": 20, "heads": 2, "head_dim": 16} if smoke else {}
    batch, seq, heads = size.get("batch", 2), size.get("seq", 300), size.get("heads", 4)
    third = seq // 3
    widths = [
        attention_case(
            f"head {dim}, {'causal' if causal else 'full'}{', atomics' if not deterministic else ''}",
            **{**size, "head_dim": dim}, causal=causal, deterministic=deterministic,
        )
        for dim in ((24,) if smoke else (64, 80, 96, 128, 256))
        for causal in (True, False) for deterministic in (True, False)
    ]  # fmt: skip
    cut = (0, third, batch * seq - third) if batch == 1 else (0, third, seq, seq + 1, batch * seq - third)
    options: dict[str, dict[str, Any]] = {
        "log-sum-exp": {"lse": True},
        "grouped queries": {"kv_heads": heads // 2},
        "more keys than queries": {"seq": third},
        "window": {"window": third},
        "two-sided window": {"causal": False, "window": third},
        "ALiBi": {"alibi": True},
        "soft cap": {"softcap": 2.5},
        "scale": {"scale": 0.3},
        "documents": {"documents": cut},
        "dropout": {"dropout": 0.3},
        "all": {
            "kv_heads": 1,
            "window": third,
            "alibi": True,
            "softcap": 2.5,
            "documents": cut,
            "dropout": 0.3,
            "lse": True,
        },
    }
    options["all, atomics"] = {**options["all"], "deterministic": False}
    return widths + [attention_case(label, **{**size, "keys": seq, **option}) for label, option in options.items()]


def head_loss_case(label: str, rows: int, vocab: int, hidden: int, **options: Any) -> Case:
    """Return a call of the head with its loss, of `rows` tokens."""

    def make(draw: Draw) -> list[Tensor]:
        labels = draw.ints(0, vocab, 1, rows)
        if rows > 2 and draw.device.type != "meta":
            labels[0, 1] = IGNORED_LABEL
        return [draw(1, rows, hidden), draw.parameter(vocab, hidden, hidden**-0.5), labels]

    def run(kernels: KernelSet, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return head_loss(x, weight, labels, placement(x, kernels), kernels=kernels.cross_entropy, **options)

    return Case(label, make, run)


def cross_entropy_cases(smoke: bool) -> list[Case]:
    """Return the comparisons of the head's loss."""
    sizes = (7, 37, 16) if smoke else (300, 5003, 256)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "in chunks": {"chunk_rows": 3},
        "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    }
    return [head_loss_case(label, *sizes, **option) for label, option in options.items()]


def decode_case(
    label: str,
    *,
    batch: int = 3,
    queries: int = 1,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    length: int = 1500,
    page: int = 0,
    equal: bool = False,
    alibi: bool = False,
    append: bool = False,
    **options: Any,
) -> Case:
    """Return a call of attention over a cache, or of what puts `queries` new tokens into it.

    Args:
        length: of the longest sample; page: tokens of a page, 0 for a contiguous cache; equal: whether all samples are
            of that length.
    """
    pages = -(-length // page) if page else 0
    shape = (batch * pages + 2, page, kv_heads, head_dim) if page else (batch, length, kv_heads, head_dim)

    def make(draw: Draw) -> list[Tensor]:
        q = draw(batch, queries, kv_heads if append else heads, head_dim, grad=False)
        lengths = draw.ints(queries, length + 1, batch, dtype=torch.int32)
        lengths = torch.full_like(lengths, length) if equal else lengths
        slopes = torch.tensor(alibi_slopes(heads), device=draw.device)
        table = draw.permutation(shape[0])[: batch * pages].view(batch, pages)
        return [q, draw(*shape, grad=False), draw(*shape, grad=False), lengths, slopes, table]

    def run(
        kernels: KernelSet, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, slopes: Tensor, table: Tensor
    ) -> tuple[Tensor, ...]:
        more = {"block_table": table if page else None}
        if append:
            kernels.append_to_cache_(k, v, q, q * 2, lengths, **more)
            return k, v
        return tensors(
            kernels.decode_attention(q, k, v, lengths, **more, **options, **({"alibi_slopes": slopes} if alibi else {}))
        )

    return Case(label, make, run)


def decode_cases(smoke: bool) -> list[Case]:
    """Return the comparisons of attention over a cache."""
    size: dict[str, Any] = {"batch": 2, "heads": 4, "head_dim": 16, "length": 40} if smoke else {}
    page, window = (8, 11) if smoke else (64, 333)
    options: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "paged": {"page": page},
        "equal lengths": {"equal": True},
        "three queries": {"queries": 3},
        "many queries": {"queries": 9, "page": page},
        "window": {"window": window},
        "soft cap": {"softcap": 2.5},
        "ALiBi": {"alibi": True},
        "all": {"queries": 3, "page": page, "window": window, "softcap": 2.5, "alibi": True, "scale": 0.3},
        "append": {"append": True, "queries": 3},
        "append to pages": {"append": True, "queries": 3, "page": page},
    }
    widths = (
        []
        if smoke
        else [decode_case(f"head {dim}, {n} queries", head_dim=dim, queries=n) for dim in (64, 80, 256) for n in (1, 9)]
    )
    return widths + [decode_case(label, **{**size, **option}) for label, option in options.items()]


def large_cases(smoke: bool) -> list[Case]:
    """Return a call of more than 2^31 elements, [2, 40000, 32768]: offsets that overflow show in its last rows.

    The reference gets these rows alone.
    """

    def run(kernels: KernelSet, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 40000 - 8, 0, 1, 0)) if kernels.name == "triton" else x
        return kernels.activations["gelu"](x)[-1:, -8:].clone()

    return [] if smoke else [Case("gelu", lambda draw: [draw(1, 8, 32768)], run, (torch.bfloat16,))]


CASES: dict[str, Callable[[bool], list[Case]]] = {
    "attention": attention_cases,
    **{name: partial(memory_cases, name) for name in MEMORY_OPS},
    "cross_entropy": cross_entropy_cases,
    "decode": decode_cases,
    "large": large_cases,
}
"""Op -> its comparisons with the reference; the argument is whether it is a smoke run."""
