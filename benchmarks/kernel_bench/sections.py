"""The tables of speed: attention, memory-bound ops, the head's loss and decoding, each beside other implementations."""

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_bench.cases import BATCH, MEMORY_OPS, ROWS, decode_case, head_loss_case
from kernel_bench.harness import Bench, Draw, Run, Seconds, outcome, peak_bytes, percent, short
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimaran.kernels.attention import AttentionOptions, triton_attention
from trimaran.kernels.attention.options import Sizes
from trimaran.kernels.attention.reference import flops
from trimaran.kernels.dispatch import TORCH, TRITON
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.plan.chips import peak_flops

Figures = dict[str, float | None]
"""By what was measured; None where it can't run."""

# What is timed: (in a whole run, in a smoke run).
HEAD_DIMS = ((64, 128), (16,))
HIDDEN = (2048, 16)  # as in the FlashAttention papers: heads = hidden / head_dim
TOKENS = (16384, 32)  # batch = tokens / seq, at least 1
SEQS = ((1024, 2048, 4096, 8192, 16384, 32768), (20,))
VOCABULARIES, LOSS_TOKENS, LOSS_HIDDEN = ((32000, 128256), (64,)), (8192, 16), (4096, 16)
BATCHES, LENGTHS = ((1, 16, 64), (2,)), ((4096, 32768), (24,))
DECODE: tuple[dict[str, Any], ...] = (
    {"heads": 32, "kv_heads": 8, "head_dim": 128},
    {"heads": 4, "kv_heads": 2, "head_dim": 16},
)
PAGE = (64, 8)
COLD_BYTES = 512 << 20  # caches that are gone through in turn hold at least these bytes: more than a second-level cache

LONG_SEQ, TO_FLASH, TO_BEST = (
    4096,
    1.0,
    0.9,
)  # the targets of attention: of flash everywhere, of the best from LONG_SEQ on
OF_COPY = 0.85  # of a memory-bound op, of the copy's bandwidth
# of the head's loss, of the unfused one's memory; chunks of logits on a GPU have 128 MiB, or 1024 rows if that is more
OF_MEMORY = 0.25
TIE = 0.98  # of a target: from here on what misses it is called a tie
ABOUT_TIES = f"A tie: at most {100 - 100 * TIE:.0f}% short of the target. Min/median: of our runs' times."


def _liger() -> Any:
    try:
        return importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None


def _attempt(measure: Callable[[], Any], notes: list[str], name: str) -> Any:
    """Return what `measure` gives; None, with the reason among the notes, where what we compare with can't do it."""
    found = outcome(measure)
    if not isinstance(found, Exception):
        return found
    note = f"{name}: {short(found)}"
    if note not in notes:
        notes.append(note)
    return None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _text(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def _steady(seconds: Seconds | None) -> str:
    return "-" if seconds is None else f"{seconds.steadiness:.2f}"


def _verdict(of_target: float) -> str:
    return "met" if of_target >= 1 else "tie" if of_target >= TIE else "**missed**"


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)


def attention_figures(bench: Bench, sizes: Sizes, causal: bool, notes: list[str]) -> dict[str, tuple[Figures, str]]:
    """Return FLOP/s of each implementation by pass, and how steady ours was; both our backward passes get torch's."""
    draw = Draw(bench.device, bench.dtype)
    inputs = [draw(sizes.batch, sizes.seq_q, sizes.heads, sizes.head_dim) for _ in range(3)]
    options = {exact: AttentionOptions(causal=causal, deterministic=exact) for exact in (False, True)}
    ours, exact = (
        bench.timer.directions(partial(triton_attention, options=options[exact]), inputs) for exact in (False, True)
    )
    theirs = {
        name: _attempt(partial(bench.timer.directions, partial(_sdpa, backend, causal=causal), inputs), notes, name)
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
    }
    found: dict[str, tuple[Figures, str]] = {}
    for name, index, mine in (("forward", 0, ours), ("backward", 1, ours), ("backward, deterministic", 1, exact)):
        work = flops(sizes, options[True], backward=index == 1)
        found[name] = (
            {key: _ratio(work, pair and pair[index]) for key, pair in {"ours": mine, **theirs}.items()},
            _steady(mine[index]),
        )
    return found


def _attention_row(bench: Bench, figures: Figures, steady: str, seq: int) -> list[str]:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    peak = peak_flops(name, str(bench.dtype).removeprefix("torch."))
    ours, best = (
        figures["ours"],
        max((value for key, value in figures.items() if key != "ours" and value is not None), default=None),
    )
    to_flash, to_best = _ratio(ours, figures["flash"]), _ratio(ours, best)
    of_target = min((to_flash or 0.0) / TO_FLASH, (to_best or 0.0) / TO_BEST if seq >= LONG_SEQ else math.inf)
    speeds = [_text(_ratio(figures[key], 1e12)) for key in ("ours", "flash", "cudnn")]
    return [
        *speeds,
        steady,
        _text(to_flash, ".2f"),
        _text(to_best, ".2f"),
        percent(_ratio(ours, peak)),
        _verdict(of_target),
    ]


def attention_section(bench: Bench) -> None:
    """Time attention over sequence lengths; a table and a plot."""
    rows, notes, curves = [], list[str](), {}
    for head_dim, causal, seq in itertools.product(HEAD_DIMS[bench.smoke], (True, False), SEQS[bench.smoke]):
        heads, mask = HIDDEN[bench.smoke] // head_dim, "causal" if causal else "full"
        sizes = Sizes(max(1, TOKENS[bench.smoke] // seq), seq, seq, heads, heads, head_dim)
        found = bench.attempt(
            f"attention, head {head_dim}, {mask}, {seq}", partial(attention_figures, bench, sizes, causal, notes)
        )
        for direction, (figures, steady) in (found or {}).items():
            curves[head_dim, causal, direction, seq] = figures
            rows.append([str(head_dim), mask, str(seq), direction, *_attention_row(bench, figures, steady, seq)])
    header = (
        "head",
        "mask",
        "seq",
        "pass",
        "ours, TFLOP/s",
        "flash",
        "cuDNN",
        "min/median",
        "to flash",
        "to best",
        "of peak",
        "target",
    )
    target = (
        f"Target: {TO_FLASH} of flash, {TO_BEST} of the faster of SDPA's two from seq {LONG_SEQ} on; "
        "its backward pass is free to use atomics."
    )
    tokens = f"{TOKENS[bench.smoke]} tokens (one sequence where it is longer)"
    shape = f"{bench.dtype}, hidden {HIDDEN[bench.smoke]}, {tokens}; FLOPs of what is seen."
    bench.report.table("Attention", header, rows, f"{shape} {target} {ABOUT_TIES}", *notes)
    plot_attention(bench, curves)


def plot_attention(bench: Bench, curves: dict[tuple[int, bool, str, int], Figures]) -> None:
    """Draw TFLOP/s against the sequence length to attention.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dims = sorted({key[0] for key in curves})
    panels = [(causal, direction) for causal in (True, False) for direction in ("forward", "backward")]
    figure, grid = pyplot.subplots(
        len(head_dims), len(panels), figsize=(4 * len(panels), 3.2 * len(head_dims)), squeeze=False
    )
    for axes_of_head, head_dim in zip(grid, head_dims, strict=True):
        for axes, (causal, direction) in zip(axes_of_head, panels, strict=True):
            chosen = {key[3]: figures for key, figures in curves.items() if key[:3] == (head_dim, causal, direction)}
            for name in ("ours", "flash", "cudnn"):
                points = {seq: value / 1e12 for seq, figures in chosen.items() if (value := figures[name]) is not None}
                axes.plot(list(points), list(points.values()), marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{direction}, {'causal' if causal else 'full'}, head {head_dim}")
            axes.set_xlabel("sequence length")
            axes.set_ylabel("TFLOP/s")
    grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(bench.report.file.parent / "attention.png", dpi=120)
    pyplot.close(figure)


def _memory_rows(bench: Bench, name: str, width: int, library: Any, notes: list[str]) -> list[list[str]]:
    op = MEMORY_OPS[name]
    inputs = op.make(Draw(bench.device, op.dtype or bench.dtype), 2 if bench.smoke else ROWS // BATCH, width)
    ours, reference = (bench.timer.directions(partial(op.run, kernels), inputs) for kernels in (TRITON, TORCH))
    liger = None
    if library is not None and op.liger is not None:
        prepare = op.liger
        liger = _attempt(lambda: bench.timer.directions(*prepare(library, *inputs)), notes, f"Liger's {name}")
    rows = []
    for index, direction in enumerate(("forward", "backward")):
        seconds, moved = ours[index], op.moved[index] * inputs[0].nbytes
        if seconds is not None:
            share = moved / seconds / bench.copy_rate(moved)
            speeds = [_text(moved / seconds / 1e9), _steady(seconds), percent(share), _verdict(share / OF_COPY)]
            others = [_text(_ratio(moved / 1e9, pair and pair[index])) for pair in (reference, liger)]
            shape = " x ".join(str(size) for size in inputs[0].shape)
            rows.append([name, shape, direction, *speeds, others[0], "not installed" if library is None else others[1]])
    return rows


def memory_section(bench: Bench, names: Sequence[str]) -> None:
    """Time the memory-bound ops against a copy."""
    library, rows, notes = _liger(), [], list[str]()
    for name in names:
        for width in (24,) if bench.smoke else MEMORY_OPS[name].widths:
            found = bench.attempt(name, partial(_memory_rows, bench, name, width, library, notes))
            rows += found if found is not None else [[name, str(width), "failed", *["-"] * 6]]
    header = ("op", "x", "pass", "ours, GB/s", "min/median", "of copy", "target", "torch reference", "Liger")
    about = f"GB/s of what must be read and written, {bench.dtype} (AdamW: float32 state, 16-bit copy)."
    moved = 1 << (12 if bench.smoke else 29)
    copy = (
        f"Target: {OF_COPY} of a copy that moves as many bytes; "
        f"one that moves {moved} reaches {bench.copy_rate(moved) / 1e9:.0f} GB/s."
    )
    bench.report.table("Memory-bound ops", header, rows, f"{about} {copy} {ABOUT_TIES}", *notes)


def _unfused(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


def _loss_rows(bench: Bench, vocab: int, library: Any, notes: list[str]) -> list[list[str]]:
    case = head_loss_case("", LOSS_TOKENS[bench.smoke], vocab, LOSS_HIDDEN[bench.smoke])
    x, weight, labels = case.make(Draw(bench.device, bench.dtype))
    flat, plain, targets = (
        x.detach().flatten(0, 1).requires_grad_(),
        weight.detach().clone().requires_grad_(),
        labels.flatten(),
    )
    # Gradients have a place to be added to, as in training: float32 for ours, the weight's own dtype for the others.
    info_of(weight).main_grad, plain.grad = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(plain)
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": partial(case.run, TRITON, x, weight, labels),
        "torch, unfused": partial(_unfused, flat, plain, targets),
    }
    if library is not None:
        losses["Liger"] = partial(library.liger_fused_linear_cross_entropy, flat, plain, targets, reduction="sum")
    found = {}
    for name, loss in losses.items():
        measure = partial(_loss_figures, bench, loss, (x, flat))
        found[name] = measure() if name == "ours" else _attempt(measure, notes, name) or (None, None)
    rows, (base_seconds, base_peak) = [], found["torch, unfused"]
    for name, (seconds, peak) in found.items():
        speed, memory = _ratio(base_seconds, seconds), _ratio(peak, base_peak)
        met = _verdict(min(speed or 0.0, OF_MEMORY / memory if memory else math.inf)) if name == "ours" else "-"
        times = [_text(seconds and seconds * 1e3, ".2f"), _steady(seconds), _text(speed, ".2f")]
        rows.append([str(vocab), name, *times, _text(peak and peak / 2**30, ".2f"), percent(memory), met])
    return rows if library is not None else [*rows, [str(vocab), "Liger", "not installed", *["-"] * 5]]


def _loss_figures(bench: Bench, loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[Seconds, int | None]:
    """(seconds, peak bytes) of one forward and backward pass."""

    def step() -> None:
        loss().backward()
        for x in inputs:
            x.grad = None

    return bench.timer.seconds(step), peak_bytes(step, bench.device)


def cross_entropy_section(bench: Bench) -> None:
    """Time the head with its loss, forward and backward, and count its memory."""
    library, rows, notes = _liger(), [], list[str]()
    for vocab in VOCABULARIES[bench.smoke]:
        rows += bench.attempt(f"cross entropy, {vocab}", partial(_loss_rows, bench, vocab, library, notes)) or []
    header = ("vocabulary", "head and loss", "ms", "min/median", "speed-up", "peak GiB", "of unfused", "target")
    sizes = (
        f"{LOSS_TOKENS[bench.smoke]} tokens, hidden {LOSS_HIDDEN[bench.smoke]}, {bench.dtype}, "
        "forward and backward pass."
    )
    target = (
        f"Target: faster, in under {percent(OF_MEMORY)} of the memory "
        "(ours holds 128 MiB of logits at a time, or 1024 rows if more)."
    )
    bench.report.table("Cross entropy", header, rows, f"{sizes} {target} {ABOUT_TIES}", *notes)


def _each(run: Run, calls: Sequence[Sequence[Tensor]]) -> None:
    for inputs in calls:
        run(*inputs)


def _sdpa_decode(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)


def _decode_row(bench: Bench, batch: int, length: int, page: int, notes: list[str]) -> list[str]:
    case = decode_case("", batch=batch, length=length, page=page, equal=True, **DECODE[bench.smoke])
    first = case.make(Draw(bench.device, bench.dtype))
    copies = 1 if bench.smoke else -(-COLD_BYTES // (2 * first[1].nbytes))
    calls = [first, *([first[0], first[1].clone(), first[2].clone(), *first[3:]] for _ in range(copies - 1))]
    all_calls = bench.timer.seconds(partial(_each, partial(case.run, TRITON), calls))
    ours = all_calls / copies
    sdpa = None if page else _attempt(partial(bench.timer.seconds, partial(_each, _sdpa_decode, calls)), notes, "SDPA")
    theirs = sdpa and sdpa / copies
    moved = 2 * batch * length * first[1][0, 0].nbytes  # of the pages, what is filled
    speeds = [_text(moved / ours / 1e9), _steady(all_calls), percent(moved / ours / bench.copy_rate(moved))]
    microseconds = [_text(1e6 * ours, ".1f"), _text(theirs and 1e6 * theirs, ".1f")]
    kind = f"pages of {page}" if page else "contiguous"
    return [str(batch), str(length), kind, *speeds, *microseconds, _text(_ratio(theirs, ours), ".2f")]


def decode_section(bench: Bench) -> None:
    """Time attention of one new token over caches, against a copy and SDPA."""
    rows, notes = [], list[str]()
    for batch, length, page in itertools.product(BATCHES[bench.smoke], LENGTHS[bench.smoke], (0, PAGE[bench.smoke])):
        name = f"decode, batch {batch}, length {length}, page {page}"
        row = bench.attempt(name, partial(_decode_row, bench, batch, length, page, notes))
        rows += [] if row is None else [row]
    header = ("batch", "length", "cache", "ours, GB/s", "min/median", "of copy", "ours, us", "SDPA, us", "speed-up")
    about = (
        f"{DECODE[bench.smoke]}, {bench.dtype}, one new token a sample; GB/s of the keys and values read, "
        "beside a copy that moves as many bytes."
    )
    bench.report.table("Decode attention", header, rows, about, *notes)
