"""The first run on new GPUs: parity of 1, 2, 4 and 8 GPUs with one, the kernels, then the speed of a 1.3B model.

    python benchmarks/first_gpus.py                       as many of 1, 2, 4, 8 GPUs as this machine has
    python benchmarks/first_gpus.py --gpus 1 2 --without-kernels
    python benchmarks/first_gpus.py --smoke               on a CPU, with tiny models: to see that it runs

Parity: a small float32 model with tied embeddings, and one with experts, train a few steps over every kind of
parallelism; the losses must be those of one GPU within 1e-4. Kernels: benchmarks/kernels.py, which writes its own
tables beside this one's. Speed: a LLaMA-style model of 1.3 billion parameters in bfloat16, sequences of 2048 tokens;
MFU counts `TransformerConfig.flops_per_token` against the dense peak of all GPUs. Writes first_gpus.md; exits with 1
where something failed or disagreed.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from kernel_bench.harness import Report
from kernel_bench.whole_model import MODELS
from rank_processes import RanksFailed, result_of_ranks

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import all_reduce
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.plan.chips import peak_flops
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.hardware import mfu
from trimaran.runtime.train.train_context import build_train_context, train_step

COUNTS = (1, 2, 4, 8)
PARITY_STEPS, PARITY_TOLERANCE = 6, 1e-4
WARM_UP_STEPS, STEPS = 3, 10
OUT_OF_MEMORY = 75  # a rank's exit code
SEQ_LEN, MICRO_BATCHES, MICROBATCHES_A_STEP = 2048, (8, 4, 2, 1), 8  # sequences: the largest that fits is taken
INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}
SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"num_layers": 8, "hidden_size": 64, "num_heads": 8, "ffn_hidden_size": 128, "vocab_size": 512,
            "tie_embeddings": True},
    "experts": {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "ffn_hidden_size": 128, "vocab_size": 512,
                "num_experts": 4, "activation": "swiglu", "bias": False},
}  # fmt: skip
PARITY: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [("gpt", {}), ("experts", {})],
    2: [
        ("gpt", {"tp": 2, "sequence_parallel": True}),
        ("gpt", {"pp": 2}),
        ("gpt", {"pp": 2} | INTERLEAVED),
        ("gpt", {"dp": 2}),
        ("experts", {"dp": 2, "ep": 2}),
    ],
    4: [
        ("gpt", {"pp": 4}),
        ("gpt", {"pp": 4, "schedule": "gpipe"}),
        ("gpt", {"tp": 2, "pp": 2}),
        ("experts", {"tp": 2, "dp": 2, "ep": 2}),
    ],
    8: [
        ("gpt", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}),
        ("gpt", {"pp": 4, "dp": 2} | INTERLEAVED),
        ("gpt", {"tp": 8}),
        ("experts", {"pp": 2, "dp": 4, "ep": 4} | INTERLEAVED),
    ],
}
SPEED: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"dp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}],
    4: [{"dp": 4}, {"tp": 4, "sequence_parallel": True}, {"tp": 2, "dp": 2, "sequence_parallel": True}, {"pp": 4}],
    8: [
        {"dp": 8},
        {"tp": 8, "sequence_parallel": True},
        {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
        {"pp": 4, "dp": 2} | INTERLEAVED,
    ],
}


@dataclass(frozen=True)
class Figures:
    """What the ranks of one job measured: losses of the steps, seconds of each, most bytes on one GPU."""

    losses: list[float]
    seconds: list[float]
    peak: int


def name_of(parallel: dict[str, Any]) -> str:
    """Return a layout in a few words, such as `tp2 pp2 interleaved`."""
    sizes = [f"{axis}{parallel[axis]}" for axis in ("tp", "pp", "dp", "ep") if axis in parallel]
    words = ["sequence parallel"] * parallel.get("sequence_parallel", False)
    words += [str(parallel["schedule"]).replace("_1f1b", "")] if "schedule" in parallel else []
    return " ".join([*sizes, *words]) or "alone"


def parity_spec(model: str, parallel: dict[str, Any], *, smoke: bool = False) -> dict[str, Any]:
    """Return the run spec of a small model: the same batches at every layout."""
    return {
        "model": SMALL[model] | ({"hidden_size": 16, "ffn_hidden_size": 16} if smoke else {}),
        "parallel": parallel,
        "kernels": {"backend": "torch"},
        "data": {"tokenizer_vocab_size": 512},
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 100, "global_batch_size": 16, "micro_batch_size": 1, "seq_len": 8 if smoke else 64},
    }


def speed_spec(parallel: dict[str, Any], micro_batch: int, *, smoke: bool = False) -> dict[str, Any]:
    """Return the run spec of the 1.3B model: `MICROBATCHES_A_STEP` microbatches on each dp rank."""
    batch = micro_batch * MICROBATCHES_A_STEP * int(parallel.get("dp", 1))
    spec = parity_spec("gpt", parallel, smoke=smoke)
    if smoke:
        return spec
    return spec | {
        "model": MODELS["llama-1.3b"],
        "kernels": {"backend": "auto"},
        "precision": {"dtype": "bfloat16"},
        "train": {
            "num_steps": 100,
            "global_batch_size": batch,
            "micro_batch_size": micro_batch,
            "seq_len": SEQ_LEN,
        },
    }


def batches_of(spec: RunSpec, step: int, mesh: Mesh) -> list[Microbatch]:
    """Return this dp rank's microbatches of random tokens that depend on the step alone."""
    train = spec.train
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(
        spec.transformer.vocab_size, (train.global_batch_size, train.seq_len + 1), generator=generator
    )
    first = mesh.dp.rank * train.global_batch_size // mesh.dp.size
    mine = tokens.chunk(mesh.dp.size)[mesh.dp.rank].split(train.micro_batch_size)
    return [
        Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), first + index * train.micro_batch_size)
        for index, part in enumerate(mine)
    ]


def train_here(spec: RunSpec, mesh: Mesh, device: torch.device, steps: int) -> Figures:
    """Train on this rank; return the figures, the same on every rank but for the seconds."""
    train_context = build_train_context(spec, mesh, device)
    losses, seconds = [], []
    for step in range(steps):
        batches = batches_of(spec, step, mesh)
        start = time.perf_counter()
        losses.append(train_step(train_context, batches, spec.optimizer.lr).loss)  # waits for the device
        seconds.append(time.perf_counter() - start)
    mine = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peaks = torch.zeros(mesh.world_size, dtype=torch.int64, device=device)
    peaks[mesh.rank] = mine
    return Figures(losses, seconds, int(all_reduce(peaks, mesh.world).max()))


def run_here(job: dict[str, Any]) -> NoReturn:
    """Run one rank of a job, print the figures on rank 0, and end as every rank does."""
    from trimaran.launchers.env.rank_env import read_env
    from trimaran.launchers.rendezvous.store import join_rendezvous
    from trimaran.launchers.worker.process import exit_process
    from trimaran.launchers.worker.process_group import join_world, leave_world

    rank_env = read_env(os.environ)
    device = torch.device("cpu") if job["smoke"] else torch.device("cuda", rank_env.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    spec = parse_spec(job["spec"])
    mesh = join_world(spec, device, join_rendezvous(rank_env, os.environ, spec.launcher, Path()))
    try:
        figures = train_here(spec, mesh, device, job["steps"])
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        exit_process(OUT_OF_MEMORY)
    if mesh.rank == 0:
        print(json.dumps(vars(figures)))
    leave_world(mesh)
    exit_process(0)


def run_apart(spec: dict[str, Any], steps: int, *, smoke: bool) -> Figures:
    """Run a job in processes of its own, one a GPU.

    Raises:
        RanksFailed: they failed, or took longer than fifteen minutes; with OUT_OF_MEMORY where a GPU was too small.
    """
    world_size = parse_spec(spec).world_size
    job = json.dumps({"spec": spec, "steps": steps, "smoke": smoke})
    threads = 1 if smoke else max(1, len(os.sched_getaffinity(0)) // world_size)
    return Figures(**result_of_ranks(__file__, ["--here", job], world_size, threads))


def say(what: str, error: Exception) -> str:
    """Print the whole of an error to standard error; return its last line, as it fits into a table's cell."""
    print(f"{what} failed:\n{error}", file=sys.stderr, flush=True)
    return f"failed: {(str(error).strip().splitlines() or ['?'])[-1][:160]}".replace("|", "/")


def parity(report: Report, counts: Sequence[int], *, smoke: bool) -> list[str]:
    """Compare every layout with one GPU; return the failures."""
    rows, failures = [], []
    alone: dict[str, list[float]] = {}
    for count in counts:
        for model, parallel in PARITY[count]:
            what = f"{model}, {name_of(parallel)}"
            print(f"parity: {what} ...", file=sys.stderr, flush=True)
            try:
                losses = run_apart(parity_spec(model, parallel, smoke=smoke), PARITY_STEPS, smoke=smoke).losses
            except RanksFailed as error:
                rows.append([str(count), what, "-", "-", say(what, error)])
                failures.append(f"parity, {what}")
                continue
            alone.setdefault(model, losses)
            pairs = zip(losses, alone[model], strict=True)
            # A loss that is not a number differs, and max would pass over it.
            off = max(abs(mine - theirs) / theirs if math.isfinite(mine) else math.inf for mine, theirs in pairs)
            verdict = "agrees" if off <= PARITY_TOLERANCE else "**differs**"
            failures += [f"parity, {what}"] * (verdict != "agrees")
            rows.append([str(count), what, f"{losses[-1]:.6f}", f"{off:.1e}", verdict])
    title = f"Losses of {PARITY_STEPS} steps in float32 against one GPU, relative"
    report.table("Parity", ("GPUs", "model, layout", "last loss", "largest difference", "verdict"), rows, title)
    return failures


def fitting(run: Callable[[int], Figures]) -> tuple[int, Figures]:
    """Return the largest microbatch that fits, and its figures. Raises what `run` raises for the smallest."""
    for micro_batch in MICRO_BATCHES[:-1]:
        try:
            return micro_batch, run(micro_batch)
        except RanksFailed as error:
            if error.exit_code != OUT_OF_MEMORY:
                raise
    return MICRO_BATCHES[-1], run(MICRO_BATCHES[-1])


def speed_row(count: int, parallel: dict[str, Any], micro_batch: int, figures: Figures, device: str) -> list[str]:
    """Return a row of the table of speeds."""
    spec = parse_spec(speed_spec(parallel, micro_batch))
    seconds = statistics.median(figures.seconds[WARM_UP_STEPS:])
    rate = spec.tokens_per_step / seconds
    share = mfu(
        rate,
        spec.transformer.flops_per_token(spec.train.seq_len),
        peak_flops(device, spec.precision.dtype),
        spec.world_size,
    )
    return [
        str(count),
        name_of(parallel),
        str(micro_batch),
        f"{rate:.0f}",
        f"{rate / count:.0f}",
        "-" if share is None else f"{share:.1%}",
        f"{1e3 * seconds:.0f}",
        f"{figures.peak / 2**30:.1f}",
        f"{figures.losses[-1]:.4f}",
    ]


def speed(report: Report, counts: Sequence[int], device: str, *, smoke: bool) -> list[str]:
    """Measure the 1.3B model at every layout; return the failures."""
    rows, failures = [], []
    for count in counts:
        for parallel in SPEED[count]:
            what = name_of(parallel)
            print(f"speed: {count} GPUs, {what} ...", file=sys.stderr, flush=True)

            def run(micro_batch: int, parallel: dict[str, Any] = parallel) -> Figures:
                return run_apart(speed_spec(parallel, micro_batch, smoke=smoke), WARM_UP_STEPS + STEPS, smoke=smoke)

            try:
                rows.append(speed_row(count, parallel, *fitting(run), device))
            except RanksFailed as error:
                rows.append([str(count), what, *["-"] * 6, say(what, error)])
                failures.append(f"speed, {count} GPUs, {what}")
    shape = parse_spec(speed_spec({}, 1)).transformer
    flops = shape.flops_per_token(SEQ_LEN)
    notes = (
        f"{shape.num_parameters() / 1e9:.2f} billion parameters, bfloat16, {SEQ_LEN} tokens a sequence, "
        f"{MICROBATCHES_A_STEP} microbatches a step on each dp rank; {flops / 1e9:.2f} GFLOP a token; medians of "
        f"{STEPS} steps after {WARM_UP_STEPS}."
    )
    header = ("GPUs", "layout", "microbatch", "tokens/s", "tokens/s/GPU", "MFU", "ms", "peak GiB", "loss")
    report.table("Speed of a 1.3B model", header, rows, notes)
    return failures


def kernels(out: Path) -> list[str]:
    """Run benchmarks/kernels.py into the same folder; return the failures."""
    command = [sys.executable, str(Path(__file__).with_name("kernels.py")), "--out", str(out)]
    return ["kernels: see kernels.md"] * (subprocess.run(command, check=False).returncode != 0)


def header(counts: Sequence[int]) -> str:
    """Return what the figures depend on."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    version = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    facts = {
        "GPUs": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none: a smoke run",
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, version)) or "none",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python benchmarks/first_gpus.py {shlex.join(sys.argv[1:])}".strip(),
        "numbers of GPUs": ", ".join(map(str, counts)),
    }
    return "\n".join(["# First GPUs", "", *(f"- {key}: {value}" for key, value in facts.items())])


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", choices=COUNTS, help="numbers of GPUs; by default all that fit")
    parser.add_argument("--without-kernels", action="store_true", help="leave out benchmarks/kernels.py")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a CPU; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--here", type=json.loads, metavar="JOB", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Compare and measure; return the exit status."""
    arguments = parse_arguments()
    if arguments.here:
        run_here(arguments.here)
    found = torch.cuda.device_count()
    wanted = arguments.gpus or [count for count in COUNTS if count <= max(found, 1)]
    if not arguments.smoke and found < max(wanted):
        need = "an NVIDIA GPU, and torch finds none" if not found else f"{max(wanted)} GPUs, and torch finds {found}"
        print(f"benchmarks/first_gpus.py needs {need}; to see that it runs, use --smoke", file=sys.stderr)
        return 2
    counts = sorted({1, *wanted})  # one GPU is what the others are compared with
    report = Report(arguments.out / "first_gpus.md")
    report.add(header(counts))
    failures = parity(report, counts, smoke=arguments.smoke)
    if not arguments.without_kernels and not arguments.smoke:
        failures += kernels(arguments.out)
    device = torch.cuda.get_device_name(0) if found else "cpu"
    failures += speed(report, counts, device, smoke=arguments.smoke)
    if failures:
        report.add("\n".join(["## Failures", "", *(f"- {failure}" for failure in failures)]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
