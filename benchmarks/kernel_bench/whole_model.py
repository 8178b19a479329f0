"""The training step of a whole model of about 1.3 billion parameters, in one process: trimaran's, with either kernels, and a plain PyTorch one."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_bench.harness import Bench, outcome, percent, short
from throughput import BETAS, LR, MAX_NORM, WEIGHT_DECAY, PlainModel, Setting

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import single
from trimaran.runtime.mesh import AXES, Mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.hardware import mfu, peak_flops
from trimaran.runtime.train.job import build_job, train_step

WARM_UP_STEPS, STEPS = 3, 10
MODELS: dict[str, dict[str, Any]] = {
    "llama-1.3b": {"num_layers": 24, "hidden_size": 2048, "num_heads": 16, "ffn_hidden_size": 5504, "vocab_size": 32000},
    "gpt3-1.3b": {"preset": "gpt3-1.3b"},
}
SMOKE_MODEL = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "ffn_hidden_size": 8, "vocab_size": 257, "tie_embeddings": True}
SEQ = (2048, 8)  # in a whole run, in a smoke run
BATCHES = ((8, 4, 2, 1), (1,))  # sequences of a step: the first number that fits
Step = Callable[[], float]
"""Takes an optimizer step and returns the loss of it."""


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        kernels: the `kernels` section of the run spec; None for the plain PyTorch model, with autocast and float32 parameters.
        compiled: whether torch.compile makes the model's forward and backward pass.
    """

    label: str
    kernels: dict[str, Any] | None
    compiled: bool = False


VARIANTS = (
    Variant("Triton kernels", {"backend": "triton"}),
    Variant("Triton kernels, atomics in attention", {"backend": "triton", "deterministic": False}),
    Variant("torch kernels", {"backend": "torch"}),
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
            "optimizer": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM},
            "train": {"num_steps": 1000, "global_batch_size": batch, "micro_batch_size": batch, "seq_len": seq},
        }
    )


def trimaran_step(spec: RunSpec, tokens: torch.Tensor, compiled: bool, backend: str) -> Step:
    """Return the step of trimaran's own job, of one rank and without a process group."""
    groups = {axis: single(axis) for axis in (*AXES, "world")}
    mesh = Mesh(0, 1, dict.fromkeys(AXES, 0), **groups, links={})
    job = build_job(spec, mesh, tokens.device)
    if compiled:
        for stage in job.stages.values():
            stage.compile(backend=backend)
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0)
    return lambda: train_step(job, [batch], LR).loss


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


def measure(bench: Bench, make: Callable[[], Step]) -> tuple[float, float, int | None]:
    """Return (median seconds of a step, loss of the last, peak bytes)."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    step = make()
    times, loss = [], 0.0
    for _ in range(2 if bench.smoke else WARM_UP_STEPS + STEPS):
        start = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(bench.device) if on_gpu else None
    return statistics.median(times[-STEPS:]), loss, peak


def free() -> None:
    """Give back what the last variant held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def variant_row(bench: Bench, name: str, variant: Variant) -> list[str]:
    """Return the table's row of one variant at the largest batch that fits; where torch.compile fails or nothing fits, it holds the error."""
    model, seq = SMOKE_MODEL if bench.smoke else MODELS[name], SEQ[bench.smoke]
    backend = "eager" if bench.smoke else "inductor"  # in a smoke run nothing is handed to a C++ compiler
    device_name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    for batch in BATCHES[bench.smoke]:
        spec = make_spec(bench, model, variant.kernels or {"backend": "torch"}, seq, batch)
        generator = torch.Generator(bench.device).manual_seed(0)
        tokens = torch.randint(spec.transformer.vocab_size, (batch, seq + 1), generator=generator, device=bench.device)

        def make(spec: RunSpec = spec, tokens: torch.Tensor = tokens) -> Step:
            if variant.kernels is None:
                return plain_step(spec, tokens, backend)
            return trimaran_step(spec, tokens, variant.compiled, backend)

        found = outcome(partial(measure, bench, make))
        free()
        if not isinstance(found, torch.OutOfMemoryError):
            break
    if isinstance(found, Exception):
        if not variant.compiled and not isinstance(found, torch.OutOfMemoryError):
            raise found
        return [variant.label, str(batch), short(found), *["-"] * 4]
    seconds, loss, peak = found
    rate = batch * seq / seconds
    share = mfu(rate, spec.transformer.flops_per_token(seq), peak_flops(device_name, spec.precision.dtype), 1)
    memory = "-" if peak is None else f"{peak / 2**30:.1f}"
    return [variant.label, str(batch), f"{rate:.0f}", percent(share), f"{1e3 * seconds:.1f}", memory, f"{loss:.5f}"]


def model_section(bench: Bench, name: str) -> None:
    """Time the training step of a model in each variant."""
    if bench.smoke and name != next(iter(MODELS)):
        return  # there is one tiny model
    rows = []
    for variant in VARIANTS:
        if variant.kernels is None and "preset" in MODELS[name]:
            continue  # the plain model is LLaMA-like
        row = bench.attempt(f"{name}, {variant.label}", partial(variant_row, bench, name, variant))
        rows.append(row or [variant.label, "-", "failed", *["-"] * 4])
    header = ("training step", "batch", "tokens/s", "MFU", "ms", "peak GiB", "loss")
    about = f"Forward, backward, clipping and AdamW, {bench.dtype}, sequences of {SEQ[bench.smoke]} tokens, one microbatch a step, no recomputation."
    losses = "Trimaran's variants train the same model on the same tokens: their losses (of the last step) must agree."
    bench.report.table(f"Whole model: {name}", header, rows, f"{about} {losses}")
