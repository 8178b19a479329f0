"""A step of DPO against a step of supervised finetuning of the same tokens, on a CPU in one process.

    python benchmarks/finetune_dpo.py [--layers 8] [--hidden 256] [--vocab 8192] [--rows 4] [--seq-len 256] [--rounds 5]

Both learn the same answers of the same packed pairs of random tokens, from the same weights, in float32 with AdamW.
The log-probabilities of DPO's reference are computed once before, and their time is printed too. The two take turns, so
that a slow moment meets both; medians are printed, in wall time and in CPU time, which is less disturbed by what else
the machine does.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trimaran.runtime.finetune.comparisons import Comparisons
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.loader import ExampleLoader, Unit
from trimaran.runtime.finetune.data.packing import pack
from trimaran.runtime.finetune.data.records import Origin
from trimaran.runtime.finetune.data.store import ExampleSet, write_split
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.samples import BatchSource
from trimaran.runtime.train.train_context import TrainContext, build_train_context, train_step

LR = 1e-6


def spec_of(arguments: argparse.Namespace, folder: Path, method: str, rows: int) -> RunSpec:
    """Return the spec of one of the two runs."""
    shape = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_heads": arguments.hidden // 32,
        "ffn_hidden_size": 8 * arguments.hidden // 3 // 8 * 8,
        "vocab_size": arguments.vocab,
        "max_seq_len": arguments.seq_len,
    }
    train = {"num_steps": 1, "global_batch_size": rows, "micro_batch_size": 1, "seq_len": arguments.seq_len}
    return parse_spec(
        {
            "model": shape,
            "data": {"source": ["pairs.jsonl"], "tokenizer": "tokenizer.json", "cache_dir": str(folder / "cache")},
            "finetune": {"method": method},
            "optimizer": {"lr": LR},
            "train": {**train, "output_dir": str(folder / method)},
            "launcher": {"device": "cpu"},
        }
    )


def pairs_of(arguments: argparse.Namespace) -> list[Example]:
    """Return pairs of random tokens that fill about the wanted rows: half of each document is an answer."""
    draw = np.random.default_rng(5)
    found: list[Example] = []
    room = arguments.rows * arguments.seq_len
    while True:
        prompt, *answers = (draw.integers(arguments.vocab, size=draw.integers(16, 48)) for _ in range(3))
        documents = tuple(
            Document.of([*prompt, *answer], [*[False] * len(prompt), *[True] * len(answer)]) for answer in answers
        )
        example = Example(documents, Origin("pairs.jsonl", len(found) + 1))
        room -= example.num_tokens
        if room < 0:
            return found
        found.append(example)


def loader_of(spec: RunSpec, examples: ExampleSet, unit: Unit) -> ExampleLoader:
    """Return the loader whose global batch holds all examples."""
    return ExampleLoader(
        examples,
        pack(examples.example_lengths, spec.train.seq_len),
        seq_len=spec.train.seq_len,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=0,
        padding_id=0,
        unit=unit,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 8, "hidden": 256, "vocab": 8192, "rows": 4, "seq-len": 256, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=600)
        measure(arguments, Path(scratch), mesh)
        mesh.close()
        dist.destroy_process_group()


def measure(arguments: argparse.Namespace, folder: Path, mesh: Mesh) -> None:
    """Let both take turns, and print medians and ratios."""
    record = write_split(folder, "train", "uint32", pairs_of(arguments), {"pairs.jsonl": 0})
    examples = ExampleSet(folder, "train", record, "uint32", ["pairs.jsonl"])
    nothing = ExampleSet(folder, "none", write_split(folder, "none", "uint32", [], {}), "uint32", [])
    rows = len(pack(examples.example_lengths, arguments.seq_len))
    plain = spec_of(arguments, folder, "sft", rows)
    spec = spec_of(arguments, folder, "preference", rows)
    comparisons = Comparisons(spec, {"train": examples, "held_out": nothing})
    sft = build_train_context(plain, mesh, torch.device("cpu"))
    dpo = build_train_context(spec, mesh, torch.device("cpu"), criterion=comparisons.criterion)
    start = time.process_time()
    comparisons.begin(dpo, resumed=False)
    reference = time.process_time() - start
    compared = comparisons.loader(loader_of(spec, examples, "examples"), "train")
    loaders: dict[str, BatchSource] = {"sft": loader_of(plain, examples, "tokens"), "dpo": compared}
    contexts: dict[str, TrainContext] = {"sft": sft, "dpo": dpo}
    found: dict[str, list[tuple[float, float]]] = {"sft": [], "dpo": []}
    for turn in range(arguments.rounds + 1):
        for name, context in contexts.items():
            loader = loaders[name]
            wall, cpu = time.perf_counter(), time.process_time()
            train_step(context, loader.microbatches(0), LR, num_losses=loader.num_losses(0))
            if turn:  # the first is a warm-up
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    tokens = loaders["sft"].num_tokens(0)
    print(f"{tokens} tokens a step in {rows} rows, {int(examples.num_learned.sum())} of them learned")
    print("| step | wall s | CPU s | of SFT, wall | of SFT, CPU |")
    print("|---|---|---|---|---|")
    base = [statistics.median(column) for column in zip(*found["sft"], strict=True)]
    for name, times in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {wall:.3f} | {cpu:.3f} | {wall / base[0]:.2f} | {cpu / base[1]:.2f} |")
    print(f"the reference's log-probabilities, once for all epochs: {reference:.3f} CPU s")


if __name__ == "__main__":
    main()
