"""A step that trains adapters against one that trains all weights, on the same model and batch, in one process.

    python benchmarks/finetune_lora.py [--threads 2] [--steps 8] [--shape LAYERS,HIDDEN,VOCABULARY,SEQ,ROWS] [--rank 16]
        [--device cpu] [--dtype float32]

Prints the median times of a whole step, forward to optimizer, measured in turns so that a slow moment meets all, by the
clock and of this process on its cores (which others on the machine do not lengthen); the ratio of each to that of all
weights; and the memory of weights, gradients and optimizer. `nf4` holds the frozen weights in 4 bits. The adapters are
beside all linear layers of the blocks.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from trimaran.models.adapter import frozen_bytes
from trimaran.models.batch import Microbatch
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import TrainContext, build_train_context, train_step

WAYS = {"all weights": None, "lora": {"base": "full"}, "lora, nf4": {"base": "nf4"}}


def spec_of(shape: str, adapter: dict[str, object] | None, dtype: str) -> RunSpec:
    """Return the run of a LLaMA-like model."""
    layers, hidden, vocabulary, seq_len, rows = map(int, shape.split(","))
    section = {} if adapter is None else {"finetune": {"adapter": adapter}, "checkpoint": {"init_from": "base"}}
    return parse_spec(
        {
            "model": {
                "num_layers": layers, "hidden_size": hidden, "num_heads": hidden // 64, "ffn_hidden_size": hidden * 3,
                "vocab_size": vocabulary, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu",
                "bias": False, "tie_embeddings": True,
            },
            "data": {"source": ["text"], "tokenizer_vocab_size": 300},
            "optimizer": {"lr": 1e-4},
            "precision": {"dtype": dtype},
            "train": {"num_steps": 1000, "global_batch_size": rows, "micro_batch_size": rows, "seq_len": seq_len},
            **section,
        }
    )  # fmt: skip


def batch_of(spec: RunSpec, device: torch.device) -> Microbatch:
    """Return a batch of random tokens."""
    shape = (spec.train.global_batch_size, spec.train.seq_len + 1)
    rows = torch.randint(spec.transformer.vocab_size, shape, device=device)
    return Microbatch(rows[:, :-1], rows[:, 1:], 0)


def timed_step(context: TrainContext, batch: Microbatch, device: torch.device) -> tuple[float, float]:
    """Return the milliseconds of one step: by the clock, and of the process on its cores."""
    begin, cores = time.perf_counter(), time.process_time()
    train_step(context, [batch], 1e-4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3, (time.process_time() - cores) * 1e3


def held_mib(context: TrainContext) -> float:
    """Return the MiB of weights, gradients and optimizer."""
    held = sum(context.optimizer.state_bytes().values())
    return (held + sum(frozen_bytes(stage) for stage in context.stages.values())) / 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shape", default="8,576,8192,256,4", metavar="LAYERS,HIDDEN,VOCABULARY,SEQ,ROWS")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=100)
        contexts = {}
        for name, settings in WAYS.items():
            adapter = None if settings is None else {**settings, "rank": args.rank}
            contexts[name] = build_train_context(spec_of(args.shape, adapter, args.dtype), mesh, device)
        batch = batch_of(next(iter(contexts.values())).spec, device)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contexts}
        for _ in range(args.steps + 1):
            for name, context in contexts.items():
                times[name].append(timed_step(context, batch, device))
        print("| step | ms | ratio | CPU ms | ratio | weights, gradients, optimizer MiB |\n|---|---|---|---|---|---|")
        medians = {
            name: [statistics.median(each) for each in zip(*measured[1:], strict=True)]
            for name, measured in times.items()
        }
        for name, middles in medians.items():
            cells = [f"{each:.0f} | {each / of:.2f}" for each, of in zip(middles, medians["all weights"], strict=True)]
            print(f"| {name} | {' | '.join(cells)} | {held_mib(contexts[name]):.0f} |", flush=True)
        mesh.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
