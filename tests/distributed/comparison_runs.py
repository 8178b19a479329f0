"""Small runs that learn from comparisons of answers: their data, and their training on ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.distributed.parity import LLAMA, Layout, make_spec
from trimaran.runtime.finetune.comparisons import ComparisonLoader, Comparisons
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.loader import ExampleLoader
from trimaran.runtime.finetune.data.packing import one_a_row, pack
from trimaran.runtime.finetune.data.records import Origin
from trimaran.runtime.finetune.data.store import ExampleSet, write_split
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import FinetuneSection
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.samples import Split
from trimaran.runtime.train.train_context import TrainContext, build_train_context, evaluate_losses, train_step

SEQ, VOCAB, NUM = 32, 263, 8
METHODS: dict[str, dict[str, Any]] = {
    "reward": {"method": "reward", "centering": 0.05},
    "dpo": {"method": "preference", "preference": {"label_smoothing": 0.1, "sft_weight": 0.3}},
    "ipo": {"method": "preference", "preference": {"loss": "ipo", "beta": 0.4}},
    "orpo": {"method": "preference", "preference": {"loss": "orpo", "beta": 0.5}},
    "kto": {"method": "preference", "preference": {"loss": "kto", "beta": 0.7}},
}


def examples(name: str, seed: int) -> list[Example]:
    """Pairs, or rated answers, of random tokens: prompts of 2 to 4 tokens, answers of 2 to 6."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(NUM):
        prompt = draw.integers(VOCAB, size=draw.integers(2, 5))
        answers = [draw.integers(VOCAB, size=draw.integers(2, 7)) for _ in range(1 if name == "kto" else 2)]
        documents = tuple(
            Document.of([*prompt, *answer], [*[False] * len(prompt), *[True] * len(answer)]) for answer in answers
        )
        value = float(number % 3 == 0) if name == "kto" else number / 10
        found.append(Example(documents, Origin("a.jsonl", number + 1), value))
    return found


def write_examples(folder: Path, name: str) -> dict[str, Any]:
    """Write both splits; return what `open_examples` reads."""
    records = {}
    for seed, split in enumerate(("train", "held_out")):
        records[split] = write_split(folder, split, "uint16", examples(name, seed), {"a.jsonl": 0})
    return {"folder": folder, "records": records}


def open_examples(written: dict[str, Any]) -> dict[Split, ExampleSet]:
    return {
        split: ExampleSet(written["folder"], split, record, "uint16", ["a.jsonl"])
        for split, record in written["records"].items()
    }


@dataclass(frozen=True)
class Case:
    """A method at a layout, with its examples packed or not, rows of a micro batch, and who optimizes."""

    layout: Layout
    method: str
    packing: str = "documents"
    micro: int = 1
    backend: str = "native"


def spec_of(case: Case, rows: int, folder: Path) -> RunSpec:
    model = {**case.layout.model, "score_head": "only" if case.method == "reward" else "none"}
    spec = make_spec(Layout(**{**vars(case.layout), "model": {**model, "score_head": "none"}}))
    section = FinetuneSection.model_validate({**METHODS[case.method], "packing": case.packing})
    train = {
        "global_batch_size": rows,
        "micro_batch_size": case.micro,
        "seq_len": SEQ,
        "output_dir": str(folder / "run"),
    }
    return spec.model_copy(
        update={
            "finetune": section,
            "model": spec.model.model_copy(update={"score_head": model["score_head"]}),
            "train": spec.train.model_copy(update=train),
            "data": spec.data.model_copy(update={"cache_dir": str(folder / "cache")}),
            "zero": spec.zero.model_copy(update={"backend": case.backend}),
        }
    )


def rows_of(examples: ExampleSet, packing: str) -> list[tuple[int, ...]]:
    """Rows that are filled to a multiple of 4 by parting some: one global batch holds all examples."""
    rows = pack(examples.example_lengths, SEQ) if packing == "documents" else one_a_row(examples.num_examples)
    while len(rows) % 4:
        longest = max(rows, key=len)
        rows = [row for row in rows if row is not longest] + [longest[:1], longest[1:]]
    return rows


def loader_of(spec: RunSpec, examples: ExampleSet, rows: Sequence[tuple[int, ...]], dp: Any) -> ExampleLoader:
    return ExampleLoader(
        examples,
        list(rows),
        seq_len=SEQ,
        global_batch_size=len(rows),
        micro_batch_size=spec.train.micro_batch_size,
        dp_rank=dp.rank,
        dp_size=dp.size,
        seed=5,
        padding_id=3,
    )


def build(case: Case, written: dict[str, Any], folder: Path) -> tuple[TrainContext, Comparisons, dict[Split, Any]]:
    """Return a rank's context, its comparisons before their beginning, and the rows of both splits."""
    sets = open_examples(written)
    rows: dict[Split, Any] = {split: rows_of(each, case.packing) for split, each in sets.items()}
    spec = spec_of(case, len(rows["train"]), folder)
    sizes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**sizes, timeout_s=100, placement=placement_of(spec), tied_embedding=spec.transformer.ties_head)
    comparisons = Comparisons(spec, sets)
    return build_train_context(spec, mesh, torch.device("cpu"), criterion=comparisons.criterion), comparisons, rows


def loaders(context: TrainContext, comparisons: Comparisons, rows: dict[Split, Any]) -> dict[Split, ComparisonLoader]:
    return {
        split: comparisons.loader(
            loader_of(context.spec, comparisons.examples[split], rows[split], context.mesh.dp), split
        )
        for split in rows
    }


def train_all(case: Case, written: dict[str, Any], folder: Path, steps: int) -> list[dict[str, float]]:
    """Train on all examples in each step; return each step's figures, then those of the held-out examples."""
    context, comparisons, rows = build(case, written, folder)
    comparisons.begin(context, resumed=False)
    dealt = loaders(context, comparisons, rows)
    figures = []
    for step in range(steps):
        at = step * len(rows["train"])
        comparisons.before_step(context, dealt["train"], at)
        result = train_step(context, dealt["train"].microbatches(at), 3e-3, num_losses=dealt["train"].num_losses(at))
        figures.append({"loss": result.loss, "norm": result.grad_norm, **result.statistics})
    if len(rows["held_out"]) == len(rows["train"]):
        comparisons.before_evaluation(context, dealt["held_out"].examples_at(0))
        held_out, statistics = evaluate_losses(context, [dealt["held_out"].microbatches(0)], NUM)
        figures.append({"held_out": held_out, **statistics})
    context.mesh.close()
    return figures


LAYOUTS = [
    Layout("dp2-zero2", {"dp": 2}, zero_stage=2),
    Layout("tp2-sp", {"tp": 2, "sequence_parallel": True}),
    Layout("tp2-pp2-dp2-zero3", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, zero_stage=3),
    Layout("pp2-zero-bubble", {"pp": 2, "schedule": "zb_h1"}),
    Layout("pp2-tied", {"pp": 2}, {**LLAMA, "tie_embeddings": True}, recompute="full"),
]
