"""Training throughput of trimaran's layouts on this machine's CPU, as a ratio to a plain PyTorch loop run around each.

    python benchmarks/throughput.py                      all layouts of the table
    python benchmarks/throughput.py tp2 tp2-pp2-dp2      some of them
    python benchmarks/throughput.py --steps 20 --without-shared-memory tp2

The model: LLaMA-style, 8 layers, hidden 256, 8 heads, ffn 704, vocab 8192, seq 256, float32, AdamW, global batch 32,
microbatch 2. The plain loop is one process with as many threads as there are cores; trimaran's ranks have one thread
each (its single process has all of them). Medians over the steps after two of warm-up. `cpu s/step` is the CPU time of
all processes together: where ranks outnumber cores it is what decides.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from rank_processes import RanksFailed, result_of_ranks
from torch import Tensor, nn

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
WARMUP_STEPS = 2
MODEL_FIELDS = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size")
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "pp4-zb-h1": {"pp": 4, "schedule": "zb_h1"},
    "dp2": {"dp": 2},
    "dp2-zero2": {"dp": 2},
    "dp2-zero3": {"dp": 2},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
    "tp2-pp2-dp2-interleaved": {"tp": 2, "pp": 2, "dp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"},
    "tp2-sequence-parallel": {"tp": 2, "sequence_parallel": True},
}

ZERO_STAGES = {"dp2-zero2": 2, "dp2-zero3": 3}
"""Of the layouts that do not have stage 1."""


@dataclass(frozen=True)
class Setting:
    """What is trained; batches in sequences."""

    num_layers: int = 8
    hidden_size: int = 256
    num_heads: int = 8
    ffn_hidden_size: int = 704
    vocab_size: int = 8192
    seq_len: int = 256
    global_batch: int = 32
    micro_batch: int = 2


SMOKE = Setting(
    num_layers=4,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=64,
    vocab_size=512,
    seq_len=32,
    global_batch=8,
    micro_batch=1,
)


class PlainBlock(nn.Module):
    """A LLaMA block as one writes it in plain PyTorch: separate projections, SDPA, torch's own RMSNorm."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        hidden, ffn, self.num_heads = setting.hidden_size, setting.ffn_hidden_size, setting.num_heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, seq, hidden]; cos, sin: [seq, head_dim / 2]."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = plain_rotary(q, cos, sin), plain_rotary(k, cos, sin)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, seq, head_dim], half-split."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class PlainModel(nn.Module):
    """The baseline's network."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        hidden, vocab = setting.hidden_size, setting.vocab_size
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(PlainBlock(setting) for _ in range(setting.num_layers))
        self.norm, self.head = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, vocab, bias=False)
        head_dim = hidden // setting.num_heads
        angles = torch.outer(torch.arange(setting.seq_len), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of tokens [batch, seq]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def plain_step(setting: Setting) -> Callable[[], None]:
    """One optimizer step of the plain loop."""
    torch.manual_seed(0)
    model = PlainModel(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    num_microbatches = setting.global_batch // setting.micro_batch

    def step() -> None:
        tokens = torch.randint(setting.vocab_size, (setting.global_batch, setting.seq_len + 1))
        for batch in tokens.split(setting.micro_batch):
            (model(batch[:, :-1], batch[:, 1:]) / num_microbatches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trimaran_step(
    setting: Setting, layout: str, shared_memory: bool
) -> tuple[Callable[[], None], Callable[[float], float], Callable[[], None]]:
    """See `step_of_rank`."""
    from trimaran.runtime.spec import parse_spec

    spec = parse_spec(
        {
            "model": {name: getattr(setting, name) for name in MODEL_FIELDS},
            "parallel": {**LAYOUTS[layout], "shared_memory": shared_memory},
            "zero": {"stage": ZERO_STAGES.get(layout, 1)},
            "data": {"tokenizer_vocab_size": setting.vocab_size},
            "optimizer": {
                "lr": LR,
                "betas": list(BETAS),
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_NORM,
            },
            "train": {
                "num_steps": 1000,
                "global_batch_size": setting.global_batch,
                "micro_batch_size": setting.micro_batch,
                "seq_len": setting.seq_len,
            },
        }
    )
    return step_of_rank(spec)


def step_of_rank(spec: "RunSpec") -> tuple[Callable[[], None], Callable[[float], float], Callable[[], None]]:
    """One optimizer step of this rank, a function that sums a number over all ranks, and one that leaves the ranks."""
    from trimaran.launchers.env.rank_env import read_env
    from trimaran.launchers.rendezvous.store import join_rendezvous
    from trimaran.launchers.worker.process_group import join_world, leave_world
    from trimaran.models.batch import Microbatch
    from trimaran.models.parallel.group import all_reduce
    from trimaran.runtime.train.train_context import build_train_context, train_step

    rendezvous = join_rendezvous(read_env(os.environ), os.environ, spec.launcher, Path())
    mesh = join_world(spec, torch.device("cpu"), rendezvous)
    train_context = build_train_context(spec, mesh, torch.device("cpu"))
    train = spec.train
    per_rank = train.global_batch_size // mesh.dp.size
    torch.manual_seed(0)

    def step() -> None:
        shape = (train.global_batch_size, train.seq_len + 1)
        tokens = torch.randint(spec.transformer.vocab_size, shape).split(per_rank)[mesh.dp.rank]
        parts = tokens.split(train.micro_batch_size)
        train_step(
            train_context, [Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), 0) for part in parts], LR
        )

    def total(value: float) -> float:
        return float(all_reduce(torch.tensor([value], dtype=torch.float64), mesh.world).item())

    return step, total, partial(leave_world, mesh)


def measure(step: Callable[[], None], steps: int, total: Callable[[float], float]) -> dict[str, float]:
    """Median seconds a step and CPU seconds a step over all ranks."""
    for _ in range(WARMUP_STEPS):
        step()
    times, cpu_start = [], time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    cpu = total(time.process_time() - cpu_start)
    return {"seconds": statistics.median(times), "cpu_seconds": cpu / steps}


def run_here(setting: Setting, layout: str, steps: int, threads: int, shared_memory: bool) -> NoReturn:
    """Measure in this process (one of the ranks), print the figures on rank 0, and end as every rank does."""
    from trimaran.launchers.worker.process import exit_process

    torch.set_num_threads(threads)
    if layout == "plain":
        figures = measure(plain_step(setting), steps, lambda value: value)
    else:
        step, total, leave = trimaran_step(setting, layout, shared_memory)
        figures = measure(step, steps, total)
        leave()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures))
    exit_process(0)


def run_apart(layout: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure in fresh processes.

    Raises:
        RanksFailed: they failed, or took longer than fifteen minutes.
    """
    cores = len(os.sched_getaffinity(0))
    sizes = LAYOUTS.get(layout, {})
    world_size = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)
    threads = cores if world_size == 1 and not options.smoke else 1
    arguments = [layout, "--steps", str(options.steps), "--here", str(threads)]
    arguments += ["--without-shared-memory"] * options.without_shared_memory + ["--smoke"] * options.smoke
    return result_of_ranks(__file__, arguments, world_size, threads)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--without-shared-memory", action="store_true", help="carry every tensor through gloo")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, to see that the benchmark runs; its figures mean nothing"
    )
    parser.add_argument("--here", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = SMOKE if options.smoke else Setting()
    if options.here:
        run_here(setting, options.layouts[0], options.steps, options.here, not options.without_shared_memory)
        return
    unknown = set(options.layouts) - set(LAYOUTS)
    if unknown:
        parser.error(f"unknown layouts {sorted(unknown)}; choose from {', '.join(LAYOUTS)}")
    tokens = setting.global_batch * setting.seq_len
    print(
        f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, {options.steps} steps, "
        f"shared memory {not options.without_shared_memory}"
    )
    print(
        f"{'layout':26} {'tokens/s':>9} {'ratio':>6} {'cpu s/step':>11} {'plain tokens/s':>15} {'plain cpu s/step':>17}"
    )
    before = run_apart("plain", options)
    failed = []
    for layout in options.layouts or LAYOUTS:
        try:
            figures = run_apart(layout, options)
            after = run_apart("plain", options)
        except RanksFailed as error:  # the other layouts are measured all the same
            print(f"{layout} failed:\n{error}", file=sys.stderr)
            failed.append(layout)
            continue
        plain = (before["seconds"] + after["seconds"]) / 2
        plain_cpu = (before["cpu_seconds"] + after["cpu_seconds"]) / 2
        rate, plain_rate = tokens / figures["seconds"], tokens / plain
        print(
            f"{layout:26} {rate:9.0f} {plain / figures['seconds']:6.2f} {figures['cpu_seconds']:11.2f} "
            f"{plain_rate:15.0f} {plain_cpu:17.2f}",
            flush=True,
        )
        before = after
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
