"""Training throughput of trimaran's layouts on this machine's CPU, as a ratio to a plain PyTorch loop run right before and after each.

    python benchmarks/throughput.py                      all layouts of the table
    python benchmarks/throughput.py tp2 tp2-pp2-dp2      some of them
    python benchmarks/throughput.py --steps 20 --without-shared-memory tp2

The model: LLaMA-style, 8 layers, hidden 256, 8 heads, ffn 704, vocab 8192, seq 256, float32, AdamW, global batch 32, microbatch 2. The plain loop is one
process with as many threads as there are cores; trimaran's ranks have one thread each (its single process has all of them). Medians over the steps
after two of warm-up. `cpu s/step` is the CPU time of all processes together: where ranks outnumber cores it is what decides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL = {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "ffn_hidden_size": 704, "vocab_size": 8192}
SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH = 256, 32, 2
LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
WARMUP_STEPS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "dp2": {"dp": 2},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
    "tp2-pp2-dp2-interleaved": {"tp": 2, "pp": 2, "dp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"},
    "tp2-sequence-parallel": {"tp": 2, "sequence_parallel": True},
}


class PlainBlock(nn.Module):
    """A LLaMA block as one writes it in plain PyTorch: separate projections, SDPA, torch's own RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        hidden, ffn = MODEL["hidden_size"], MODEL["ffn_hidden_size"]
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, seq, hidden]; cos, sin: [seq, head_dim / 2]."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (MODEL["num_heads"], -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
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

    def __init__(self) -> None:
        super().__init__()
        hidden, vocab = MODEL["hidden_size"], MODEL["vocab_size"]
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(MODEL["num_layers"]))
        self.norm, self.head = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, vocab, bias=False)
        head_dim = hidden // MODEL["num_heads"]
        angles = torch.outer(torch.arange(SEQ_LEN), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
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


def plain_step() -> Callable[[], None]:
    """One optimizer step of the plain loop."""
    torch.manual_seed(0)
    model = PlainModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    num_microbatches = GLOBAL_BATCH // MICRO_BATCH

    def step() -> None:
        tokens = torch.randint(MODEL["vocab_size"], (GLOBAL_BATCH, SEQ_LEN + 1))
        for batch in tokens.split(MICRO_BATCH):
            (model(batch[:, :-1], batch[:, 1:]) / num_microbatches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trimaran_step(layout: str, shared_memory: bool) -> tuple[Callable[[], None], Callable[[], float]]:
    """One optimizer step of this rank, and a function that sums a number over all ranks."""
    from trimaran.launchers.worker import join_world
    from trimaran.models.batch import Microbatch
    from trimaran.models.parallel.group import all_reduce
    from trimaran.runtime.spec import parse_spec
    from trimaran.runtime.train.job import build_job, train_step

    spec = parse_spec(
        {
            "model": MODEL,
            "parallel": {**LAYOUTS[layout], "shared_memory": shared_memory},
            "data": {"tokenizer_vocab_size": MODEL["vocab_size"]},
            "optimizer": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM},
            "train": {"num_steps": 1000, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "seq_len": SEQ_LEN},
        }
    )
    mesh = join_world(spec, torch.device("cpu"))
    job = build_job(spec, mesh, torch.device("cpu"))
    per_rank = GLOBAL_BATCH // mesh.dp.size
    torch.manual_seed(0)

    def step() -> None:
        tokens = torch.randint(MODEL["vocab_size"], (GLOBAL_BATCH, SEQ_LEN + 1)).split(per_rank)[mesh.dp.rank]
        parts = tokens.split(MICRO_BATCH)
        train_step(job, [Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), 0) for part in parts], LR)

    return step, lambda value: float(all_reduce(torch.tensor([value], dtype=torch.float64), mesh.world).item())


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


def run_here(layout: str, steps: int, threads: int, shared_memory: bool) -> None:
    """Measure in this process (one of the ranks); rank 0 prints the figures."""
    torch.set_num_threads(threads)
    if layout == "plain":
        figures = measure(plain_step(), steps, lambda value: value)
    else:
        step, total = trimaran_step(layout, shared_memory)
        figures = measure(step, steps, total)
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures))


def run_apart(layout: str, steps: int, shared_memory: bool) -> dict[str, float]:
    """Measure in fresh processes."""
    cores = len(os.sched_getaffinity(0))
    sizes = LAYOUTS.get(layout, {})
    world_size = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)
    threads = cores if world_size == 1 else 1
    arguments = [__file__, layout, "--steps", str(steps), "--here", str(threads)] + ([] if shared_memory else ["--without-shared-memory"])
    command = [sys.executable, *arguments]
    if world_size > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{layout} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--without-shared-memory", action="store_true", help="carry every tensor through gloo")
    parser.add_argument("--here", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shared_memory = not options.without_shared_memory
    if options.here:
        run_here(options.layouts[0], options.steps, options.here, shared_memory)
        return
    unknown = set(options.layouts) - set(LAYOUTS)
    if unknown:
        parser.error(f"unknown layouts {sorted(unknown)}; choose from {', '.join(LAYOUTS)}")
    tokens = GLOBAL_BATCH * SEQ_LEN
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, {options.steps} steps, shared memory {shared_memory}")
    print(f"{'layout':26} {'tokens/s':>9} {'ratio':>6} {'cpu s/step':>11} {'plain tokens/s':>15} {'plain cpu s/step':>17}")
    before = run_apart("plain", options.steps, True)
    for layout in options.layouts or LAYOUTS:
        figures = run_apart(layout, options.steps, shared_memory)
        after = run_apart("plain", options.steps, True)
        plain = (before["seconds"] + after["seconds"]) / 2
        rate, plain_rate = tokens / figures["seconds"], tokens / plain
        print(
            f"{layout:26} {rate:9.0f} {plain / figures['seconds']:6.2f} {figures['cpu_seconds']:11.2f} {plain_rate:15.0f} {after['cpu_seconds']:17.2f}",
            flush=True,
        )
        before = after


if __name__ == "__main__":
    main()
