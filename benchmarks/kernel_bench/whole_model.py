"""A training step of a 1.3-billion-parameter model in one process: trimaran's, with either kernels, and PyTorch's."""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_bench.harness import Bench, Seconds, outcome, percent, short
from throughput import BETAS, LR, MAX_NORM, WEIGHT_DECAY, PlainModel, Setting

from trimaran.models.batch import Microbatch
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.plan.chips import peak_flops
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.hardware import mfu
from trimaran.runtime.train.train_context import build_train_context, train_step

WARM_UP_STEPS, STEPS = 3, 10
MODELS: dict[str, dict[str, Any]] = {
    "llama-1.3b": {
        "num_layers": 24,
        "hidden_size": 2048,
        "num_heads": 16,
        "ffn_hidden_size": 5504,
        "vocab_size": 32000,
    },
    "gpt3-1.3b": {"preset": "gpt3-1.3b"},
}
SMOKE_MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_heads": 1,
    "ffn_hidden_size": 8,
    "vocab_size": 257,
    "tie_embeddings": True,
}
SEQ = (2048, 8)  # in a whole run, in a smoke run
BATCHES = ((8, 4, 2, 1), (1,))  # sequences of a step: the first number that fits every variant
LOSS_STEP, LOSS_TOLERANCE = (
    3,
    0.005,
)  # which step's loss is compared (in a smoke run the last), and how far apart they may be
Step = Callable[[], float]
"""Takes an optimizer step and returns the loss of it."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train.

    Args:
        kernels: the `kernels` section of the run spec; None for the plain PyTorch model, with autocast and float32
            parameters.
        compiled: whether torch.compile makes the model's forward and backward pass.
    """

    label: str
    kernels: dict[str, Any] | None
    compiled: bool = False


@dataclass(frozen=True)
class Figures:
    """What was measured of a variant.

    Args:
        seconds: of a step; loss: of step LOSS_STEP; peak: bytes of memory; mfu: share of the peak.
    """

    seconds: Seconds
    loss: float
    peak: int | None
    mfu: float | None


REFERENCE = Variant("torch kernels", {"backend": "torch"})
VARIANTS = (
    Variant("Triton kernels", {"backend": "triton"}),
    Variant("Triton kernels, atomics in attention", {"backend": "triton", "deterministic": False}),
    REFERENCE,
    Variant("torch kernels, torch.compile", {"backend": "torch"}, compiled=True),
    Variant("plain PyTorch, torch.compile", None, compiled=True),
)


def make_spec(bench: Bench, model: dict[str, Any], kernels: dict[str, Any], seq: int, batch: int) -> RunSpec:
    """Return the run spec of one variant: one microbatch a step."""
    return parse_spec(
        {
            "model": model,
            "precision": {"dtype": str(bench.dtype).removeprefix("torch.")},
            "kernels": kernels,
            "data": {"tokenizer_vocab_size": 257},
            "optimizer": {
                "lr": LR,
                "betas": list(BETAS),
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_NORM,
            },
            "train": {"num_steps": 1000, "global_batch_size": batch, "micro_batch_size": batch, "seq_len": seq},
        }
    )


def trimaran_step(spec: RunSpec, tokens: torch.Tensor, compiled: bool, backend: str) -> Step:
    """Return the step of trimaran's own job, of one rank and without a process group."""
    train_context = build_train_context(spec, lone_mesh(), tokens.device)
    if compiled:
        for stage in train_context.stages.values():
            stage.compile(backend=backend)
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0)
    return lambda: train_step(train_context, [batch], LR).loss


def plain_step(spec: RunSpec, tokens: torch.Tensor, backend: str) -> Step:
    """Return the step of the plain PyTorch model of benchmarks/throughput.py, compiled, in mixed precision."""
    shape = spec.transformer
    names = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size")
    setting = Setting(**{name: getattr(shape, name) for name in names}, seq_len=spec.train.seq_len)
    torch.manual_seed(0)
    model = PlainModel(setting).to(tokens.device)
    forward = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    half = spec.precision.dtype == "bfloat16"

    def step() -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(bench: Bench, spec: RunSpec, make: Callable[[], Step]) -> Figures:
    """Return the figures of a step."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    step = make()
    times, losses = [], []
    for _ in range(2 if bench.smoke else WARM_UP_STEPS + STEPS):
        start = time.perf_counter()
        losses.append(step())
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(bench.device) if on_gpu else None
    counted = times[-STEPS:]
    seconds = Seconds(statistics.median(counted))
    seconds.steadiness = min(counted) / seconds
    rate = spec.train.global_batch_size * spec.train.seq_len / seconds
    device_name = torch.cuda.get_device_name(bench.device) if on_gpu else "cpu"
    share = mfu(
        rate, spec.transformer.flops_per_token(spec.train.seq_len), peak_flops(device_name, spec.precision.dtype), 1
    )
    return Figures(seconds, losses[:LOSS_STEP][-1], peak, share)


def free() -> None:
    """Give back what the last variant held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def variant_figures(bench: Bench, name: str, variant: Variant, batch: int) -> Figures:
    """Return the figures of one variant at this batch size.

    Raises what torch.compile raises, and torch.OutOfMemoryError.
    """
    model, seq = SMOKE_MODEL if bench.smoke else MODELS[name], SEQ[bench.smoke]
    backend = "eager" if bench.smoke else "inductor"  # in a smoke run nothing is handed to a C++ compiler
    spec = make_spec(bench, model, variant.kernels or {"backend": "torch"}, seq, batch)
    generator = torch.Generator(bench.device).manual_seed(0)
    tokens = torch.randint(spec.transformer.vocab_size, (batch, seq + 1), generator=generator, device=bench.device)
    if variant.kernels is None:
        return measure(bench, spec, lambda: plain_step(spec, tokens, backend))
    return measure(bench, spec, lambda: trimaran_step(spec, tokens, variant.compiled, backend))


def all_figures(bench: Bench, name: str, variants: Sequence[Variant]) -> tuple[int, dict[Variant, Figures | Exception]]:
    """Return the largest batch that fits every variant (else the smallest), and the figures or error of each."""
    found: dict[Variant, Figures | Exception] = {}
    for batch in BATCHES[bench.smoke]:
        found.clear()
        for variant in variants:
            print(f"{name}, {variant.label}, batch {batch} ...", file=sys.stderr, flush=True)
            found[variant] = outcome(partial(variant_figures, bench, name, variant, batch))
            free()
            if isinstance(found[variant], torch.OutOfMemoryError) and batch != BATCHES[bench.smoke][-1]:
                break
        else:
            break
    return batch, found


def agreement(ours: Figures | Exception, reference: Figures | Exception) -> tuple[str, bool]:
    """Return (verdict, whether it is wrong) of a variant's early loss against the reference's."""
    if isinstance(ours, Exception) or isinstance(reference, Exception):
        return "-", False
    difference = abs(ours.loss - reference.loss) / reference.loss
    right = difference <= LOSS_TOLERANCE  # false of nan
    return ("agrees" if right else f"**off by {difference:.1e}**"), not right


def model_section(bench: Bench, name: str) -> None:
    """Time the training step of a model in each variant and compare their losses."""
    if bench.smoke and name != next(iter(MODELS)):
        return  # there is one tiny model
    is_llama = "preset" not in MODELS[name]  # as the plain model is
    variants = [variant for variant in VARIANTS if variant.kernels is not None or is_llama]
    batch, found = all_figures(bench, name, variants)
    rows = []
    for variant, figures in found.items():
        title = f"{name}, {variant.label}"
        if isinstance(figures, Exception):
            rows.append([variant.label, short(figures), *["-"] * 6])
            if not variant.compiled and not isinstance(figures, torch.OutOfMemoryError):
                bench.failures.append(f"{title}: {short(figures)}")
                traceback.print_exception(figures)
            continue
        verdict, wrong = ("-", False) if variant.kernels is None else agreement(figures, found[REFERENCE])
        if wrong:
            bench.failures.append(f"{title}: its loss is {verdict} from that of the {REFERENCE.label}")
        rate, memory = (
            batch * SEQ[bench.smoke] / figures.seconds,
            "-" if figures.peak is None else f"{figures.peak / 2**30:.1f}",
        )
        times = [f"{1e3 * figures.seconds:.1f}", f"{figures.seconds.steadiness:.2f}"]
        rows.append(
            [variant.label, f"{rate:.0f}", percent(figures.mfu), *times, memory, f"{figures.loss:.5f}", verdict]
        )
    header = ("training step", "tokens/s", "MFU", "ms", "min/median", "peak GiB", "loss", "agreement")
    most = f"(of {BATCHES[bench.smoke]}, the most that fit all)"
    tokens = f"{batch} sequences of {SEQ[bench.smoke]} tokens in one microbatch {most}"
    about = f"Forward, backward, clipping and AdamW, {bench.dtype}, no recomputation; a step takes {tokens}."
    losses = (
        f"Trimaran's variants train the same model on the same tokens: their losses (of step {LOSS_STEP}, "
        "after whole steps but before rounding errors grow) "
        f"must agree with those of the {REFERENCE.label} within {100 * LOSS_TOLERANCE:g}%."
    )
    plain = (
        "Plain PyTorch keeps float32 parameters and runs under bfloat16 autocast: its residual stream is float32. "
        "Trimaran's variants are bfloat16 throughout, with float32 main copies of the parameters in the optimizer. "
        "They do not do the same work to the last bit."
    )
    bench.report.table(f"Whole model: {name}", header, rows, f"{about} {losses}", *([plain] if is_llama else []))
