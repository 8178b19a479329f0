"""The tables of speed: attention, the memory-bound ops, the head's loss and decoding, each beside what else does the same in the same run."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_bench.cases import BATCH, MEMORY_OPS, ROWS, decode_case, head_loss_case
from kernel_bench.harness import Bench, Draw, Run, outcome, peak_bytes, percent, short
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimaran.kernels.attention import AttentionOptions, triton_attention
from trimaran.kernels.attention.options import Sizes
from trimaran.kernels.attention.twin import flops
from trimaran.kernels.dispatch import TORCH, TRITON
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.train.hardware import peak_flops

Figures = dict[str, float | None]
"""By what was measured; None where it can't run."""

# What is timed: (whole, smoke).
HEAD_DIMS = ((64, 128), (16,))
HIDDEN = (2048, 32)  # as in the FlashAttention papers: heads = hidden / head_dim
TOKENS = (16384, 64)  # batch = tokens / seq, at least 1
SEQS = ((1024, 2048, 4096, 8192, 16384, 32768), (16, 32))
VOCABULARIES, LOSS_TOKENS, LOSS_HIDDEN = ((32000, 128256), (64,)), (8192, 16), (4096, 16)
BATCHES, LENGTHS = ((1, 16, 64), (2,)), ((4096, 32768), (24,))
DECODE = ({"heads": 32, "kv_heads": 8, "head_dim": 128}, {"heads": 4, "kv_heads": 2, "head_dim": 16})
PAGE = (64, 8)
COLD_BYTES = 512 << 20  # caches that are gone through in turn hold at least these bytes: more than a second-level cache

LONG_SEQ, TO_FLASH, TO_BEST = 4096, 1.0, 0.9  # the targets of attention: of flash everywhere, of the best from LONG_SEQ on
OF_COPY = 0.85  # of a memory-bound op, of the copy's bandwidth
OF_MEMORY = 0.25  # of the head's loss, of the unfused one's memory


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


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)


def attention_figures(bench: Bench, sizes: Sizes, causal: bool, notes: list[str]) -> dict[str, Figures]:
    """Return FLOP/s of each implementation, of the forward and the backward pass (torch's for both of ours)."""
    draw = Draw(bench.device, bench.dtype)
    inputs = [draw(sizes.batch, sizes.seq_q, sizes.heads, sizes.head_dim) for _ in range(3)]
    options = [AttentionOptions(causal=causal, deterministic=deterministic) for deterministic in (True, False)]
    runs: dict[str, Run] = {
        "ours": partial(triton_attention, options=options[1]),
        "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION, causal=causal),
        "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION, causal=causal),
    }
    times = {name: _attempt(partial(bench.timer.directions, run, inputs), notes, name) for name, run in runs.items() if name != "ours"}
    times["ours"] = bench.timer.directions(runs["ours"], inputs)
    exact = bench.timer.directions(partial(triton_attention, options=options[0]), inputs)
    found: dict[str, Figures] = {}
    for index, name in enumerate(("forward", "backward")):
        work = flops(sizes, options[0], backward=index == 1)
        found[name] = {key: None if pair is None else work / pair[index] for key, pair in times.items()}
        if index == 1:
            found["backward, deterministic"] = {**found[name], "ours": work / exact[1]}
    return found


def attention_section(bench: Bench) -> None:
    """Time attention over sequence lengths; a table and a plot."""
    i, rows, notes, curves = int(bench.smoke), [], list[str](), {}
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    peak = peak_flops(name, str(bench.dtype).removeprefix("torch."))
    for head_dim in HEAD_DIMS[i]:
        for causal in (True, False):
            for seq in SEQS[i]:
                heads = HIDDEN[i] // head_dim
                sizes = Sizes(max(1, TOKENS[i] // seq), seq, seq, heads, heads, head_dim)
                for direction, figures in attention_figures(bench, sizes, causal, notes).items():
                    curves[head_dim, causal, direction, seq] = figures
                    ours, flash = figures["ours"], figures["flash"]
                    assert ours is not None
                    others = [value for key, value in figures.items() if key != "ours" and value is not None]
                    to_flash, to_best = _ratio(ours, flash), _ratio(ours, max(others, default=None))
                    met = (to_flash or 0.0) >= TO_FLASH and (seq < LONG_SEQ or (to_best or 0.0) >= TO_BEST)
                    figures_text = [_text(None if value is None else value / 1e12) for value in (ours, flash, figures["cudnn"])]
                    case = [str(head_dim), "causal" if causal else "full", str(seq), direction]
                    shares = [_text(to_flash, ".2f"), _text(to_best, ".2f"), percent(_ratio(ours, peak))]
                    rows.append([*case, *figures_text, *shares, _verdict(met) if others else "-"])
    header = ("head", "mask", "seq", "pass", "ours, TFLOP/s", "SDPA flash", "SDPA cuDNN", "to flash", "to best", "of peak", "target")
    target = f"Target: {TO_FLASH} of flash, {TO_BEST} of the faster of the two from seq {LONG_SEQ} on; SDPA's backward pass is free to use atomics."
    shape = f"{bench.dtype}, hidden {HIDDEN[i]}, {TOKENS[i]} tokens (one sequence where it is longer), FLOPs of what is seen."
    bench.report.table("Attention", header, rows, f"{shape} {target}", *notes)
    plot_attention(bench, curves)


def plot_attention(bench: Bench, curves: dict[tuple[int, bool, str, int], Figures]) -> None:
    """Draw TFLOP/s against the sequence length to attention.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dims = sorted({key[0] for key in curves})
    panels = [(causal, direction) for causal in (True, False) for direction in ("forward", "backward")]
    figure, grid = pyplot.subplots(len(head_dims), len(panels), figsize=(4 * len(panels), 3.2 * len(head_dims)), squeeze=False)
    for axes_of_head, head_dim in zip(grid, head_dims, strict=True):
        for axes, (causal, direction) in zip(axes_of_head, panels, strict=True):
            chosen = {key[3]: figures for key, figures in curves.items() if key[:3] == (head_dim, causal, direction)}
            for name in ("ours", "flash", "cudnn"):
                points = [(seq, figures[name]) for seq, figures in chosen.items() if figures[name] is not None]
                axes.plot([seq for seq, _ in points], [value / 1e12 for _, value in points], marker="o", label=name)
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
    ours, twin = (bench.timer.directions(partial(op.run, kernels), inputs) for kernels in (TRITON, TORCH))
    liger = None
    if library is not None and op.liger is not None:
        prepare = op.liger
        liger = _attempt(lambda: bench.timer.directions(*prepare(library, *inputs)), notes, f"Liger's {name}")
    rows = []
    for index, direction in enumerate(("forward", "backward")):
        seconds, moved = ours[index], op.moved[index] * inputs[0].nbytes
        if seconds is not None:
            share = moved / seconds / bench.copy_bytes_per_second
            speeds = [_text(moved / seconds / 1e9), percent(share), _verdict(share >= OF_COPY)]
            others = [_text(pair and moved / pair[index] / 1e9) for pair in (twin, liger)]
            shape = " x ".join(str(size) for size in inputs[0].shape)
            rows.append([name, shape, direction, *speeds, others[0], "not installed" if library is None else others[1]])
    return rows


def memory_section(bench: Bench, names: Sequence[str]) -> None:
    """Time the memory-bound ops against a copy."""
    library, rows, notes = _liger(), [], list[str]()
    for name in names:
        for width in (24,) if bench.smoke else MEMORY_OPS[name].widths:
            found = bench.attempt(name, partial(_memory_rows, bench, name, width, library, notes))
            rows += found if found is not None else [[name, str(width), "failed", *["-"] * 5]]
    header = ("op", "x", "pass", "ours, GB/s", "of copy", "target", "torch twin", "Liger")
    about = f"GB/s of what must be read and written, {bench.dtype} (AdamW: float32 state, 16-bit copy)."
    bench.report.table("Memory-bound ops", header, rows, f"{about} A copy moves {bench.copy_bytes_per_second / 1e9:.0f} GB/s.", *notes)


def _unfused(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


def cross_entropy_section(bench: Bench) -> None:
    """Time the head with its loss, forward and backward, and count its memory."""
    i, library, rows, notes = int(bench.smoke), _liger(), [], list[str]()
    for vocab in VOCABULARIES[i]:
        case = head_loss_case("", LOSS_TOKENS[i], vocab, LOSS_HIDDEN[i])
        x, weight, labels = case.make(Draw(bench.device, bench.dtype))
        flat, plain, targets = x.detach().flatten(0, 1).requires_grad_(), weight.detach().clone().requires_grad_(), labels.flatten()
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
        base_seconds, base_peak = found["torch, unfused"]
        for name, (seconds, peak) in found.items():
            speed, memory = _ratio(base_seconds, seconds), _ratio(peak, base_peak)
            met = _verdict((speed or 0.0) > 1.0 and (memory or 0.0) < OF_MEMORY) if name == "ours" else "-"
            figures = [_text(seconds and seconds * 1e3, ".2f"), _text(speed, ".2f"), _text(peak and peak / 2**30, ".2f"), percent(memory)]
            rows.append([str(vocab), name, *figures, met])
        if library is None:
            rows.append([str(vocab), "Liger", "not installed", *["-"] * 4])
    header = ("vocabulary", "head and loss", "ms", "speed-up", "peak GiB", "of unfused", "target")
    about = f"{LOSS_TOKENS[i]} tokens, hidden {LOSS_HIDDEN[i]}, {bench.dtype}, forward and backward pass."
    bench.report.table("Cross entropy", header, rows, f"{about} Target: faster, in under {percent(OF_MEMORY)} of the memory.", *notes)


def _loss_figures(bench: Bench, loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[float, int | None]:
    """(seconds, peak bytes) of one forward and backward pass."""

    def step() -> None:
        loss().backward()
        for x in inputs:
            x.grad = None

    return bench.timer.seconds(step), peak_bytes(step, bench.device)


def _each(run: Run, calls: Sequence[Sequence[Tensor]]) -> None:
    for inputs in calls:
        run(*inputs)


def _sdpa_decode(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)


def decode_section(bench: Bench) -> None:
    """Time attention of one new token over caches, against a copy and SDPA."""
    i, rows, notes = int(bench.smoke), [], list[str]()
    for batch in BATCHES[i]:
        for length in LENGTHS[i]:
            for page in (0, PAGE[i]):
                case = decode_case("", batch=batch, length=length, page=page, equal=True, **DECODE[i])
                first = case.make(Draw(bench.device, bench.dtype))
                size = first[1].nbytes + first[2].nbytes
                copies = 1 if bench.smoke else -(-COLD_BYTES // size)
                calls = [first, *([first[0], first[1].clone(), first[2].clone(), *first[3:]] for _ in range(copies - 1))]
                ours = bench.timer.seconds(partial(_each, partial(case.run, TRITON), calls)) / copies
                sdpa = None if page else _attempt(partial(bench.timer.seconds, partial(_each, _sdpa_decode, calls)), notes, "SDPA")
                theirs = sdpa and sdpa / copies
                moved = 2 * batch * length * first[1][0, 0].nbytes  # of the pages, what is filled
                speeds = [_text(moved / ours / 1e9), percent(moved / ours / bench.copy_bytes_per_second)]
                kind = f"pages of {page}" if page else "contiguous"
                microseconds = [_text(1e6 * ours, ".1f"), _text(theirs and 1e6 * theirs, ".1f")]
                rows.append([str(batch), str(length), kind, *speeds, *microseconds, _text(_ratio(theirs, ours), ".2f")])
    header = ("batch", "length", "cache", "ours, GB/s", "of copy", "ours, us", "SDPA, us", "speed-up")
    about = f"{DECODE[i]}, {bench.dtype}, one new token a sample; GB/s of the keys and values read."
    bench.report.table("Decode attention", header, rows, about, *notes)
