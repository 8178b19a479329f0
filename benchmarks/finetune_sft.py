"""Supervised finetuning on a CPU in one process: trimaran packed and padded against TRL's SFTTrainer, padded.

    python benchmarks/finetune_sft.py --model FOLDER --data FILE [--rows 2] [--seq-len 256] [--rounds 3] [--peer none]

FOLDER holds a model of Hugging Face with a chat template, FILE examples of any format. All learn the same tokens of the
same examples from the same weights, in float32 with AdamW; that the losses of one batch are equal is checked first. The
ways take turns, so that a slow moment meets all, and medians are printed: tokens of examples, without padding, per
second and per second of CPU time, which is less disturbed by what else the machine does. TRL takes about as many
examples a step as the packed rows hold, pads them to the longest, and keeps its activations.
Needs trl (pip install trl), but for --peer none, which compares packed and padded rows alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimaran.models.huggingface import family_of, resolve
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.transformer import Stage
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.account import ExampleAccount
from trimaran.runtime.finetune.data.examples import Example
from trimaran.runtime.finetune.data.formats import find_example_files, read_examples
from trimaran.runtime.finetune.data.loader import ExampleLoader
from trimaran.runtime.finetune.data.packing import one_a_row, pack
from trimaran.runtime.finetune.data.prepare import example_of
from trimaran.runtime.finetune.data.store import ExampleSet, write_split
from trimaran.runtime.finetune.data.templates import ConversationEncoder
from trimaran.runtime.infer.chat import ChatTemplate
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.train_context import TrainContext, build_train_context, evaluate_losses, train_step

Step = Callable[[], int]
"""Takes a step; returns the tokens of its examples, without padding."""
LR = 1e-6


def examples_of(model: Path, data: str, seq_len: int) -> list[Example]:
    """Return the examples that fit a row."""
    encoder = ConversationEncoder(Tokenizer.load(model / "tokenizer.json"), ChatTemplate.find(model))
    records = read_examples(find_example_files([data]), "auto", "sft", ExampleAccount())
    examples = [example_of(record, encoder, "answers") for record in records]
    return [example for example in examples if example.num_tokens <= seq_len]


def spec_of(model: Path, arguments: argparse.Namespace, rows: int) -> RunSpec:
    """Return the spec of the model's shape."""
    config = json.loads((model / "config.json").read_text())
    shape = family_of(config).to_config(config)
    train = {"num_steps": 1000, "global_batch_size": rows, "micro_batch_size": 1, "seq_len": arguments.seq_len}
    return parse_spec(
        {
            "model": shape if isinstance(shape, dict) else shape.model_dump(),
            "data": {"tokenizer_vocab_size": 300},
            "optimizer": {"lr": LR},
            "train": train,
            "launcher": {"device": "cpu"},
        }
    )


class Ours:
    """Training of ours, packed or one example a row."""

    def __init__(self, spec: RunSpec, mesh: Mesh, examples: ExampleSet, weights: Any, *, packed: bool) -> None:
        self.spec, self.context = spec, build_train_context(spec, mesh, torch.device("cpu"))
        load(self.context, spec, weights)
        rows = pack(examples.example_lengths, spec.train.seq_len) if packed else one_a_row(examples.num_examples)
        size = spec.train.global_batch_size
        self.loader = ExampleLoader(
            examples,
            rows,
            seq_len=spec.train.seq_len,
            global_batch_size=size,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
            seed=1,
            padding_id=0,
        )
        self.at = 0

    def step(self) -> int:
        """Take a step; return the tokens of its examples."""
        at, self.at = self.at, self.at + self.spec.train.global_batch_size
        train_step(self.context, self.loader.microbatches(at), LR, num_losses=self.loader.num_losses(at))
        return self.loader.num_tokens(at)

    def loss(self, at: int) -> float:
        """Return the loss of a global batch."""
        return evaluate_losses(self.context, [self.loader.microbatches(at)], self.loader.num_losses(at))[0]

    def examples_of_step(self, at: int) -> list[int]:
        """Return the numbers of the examples of a global batch."""
        return [
            number
            for batch in self.loader.microbatches(at)
            for number in batch.document_numbers.tolist()  # type: ignore[attr-defined]
        ]


def load(context: TrainContext, spec: RunSpec, weights: Any) -> None:
    """Copy weights of Hugging Face into our stage, and into the optimizer's main parameters."""
    (stage,) = context.stages.values()
    assert isinstance(stage, Stage)
    found = {}
    for unit in resolve(family_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}), spec.transformer):
        ours = unit.to_ours([weights[name] for name in unit.theirs], spec.transformer)
        found |= dict(zip(unit.ours, ours, strict=True))

    def read(name: str, key: str, shard: ShardSpec, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        return found[name].flatten()[start:stop]

    context.optimizer.load(read, 0, weights_only=True)


def rows_of(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Return examples as rows of TRL's data sets, tokenized."""
    documents = [each.documents[0] for each in examples]
    return [{"input_ids": d.tokens.tolist(), "completion_mask": d.learned.astype(int).tolist()} for d in documents]


def labels_of(row: dict[str, list[int]]) -> list[int]:
    """Return the learned tokens of a row, -100 for the others."""
    return [token if learned else -100 for token, learned in zip(row["input_ids"], row["completion_mask"], strict=True)]


class Theirs:
    """TRL's SFTTrainer on the same tokens and masks."""

    def __init__(self, model: Path, examples: Sequence[Example], batch: int, seq_len: int) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        rows = rows_of(examples)
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            max_length=seq_len,
            learning_rate=LR,
            max_steps=1_000_000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            completion_only_loss=True,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = SFTTrainer(
            self.model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        self.trainer.create_optimizer_and_scheduler(1_000_000)
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(self.trainer.get_train_dataloader())

    def step(self) -> int:
        """Take a step as the trainer does; return the tokens of its examples."""
        try:
            inputs = next(self.batches)
        except StopIteration:
            self.batches = iter(self.trainer.get_train_dataloader())
            inputs = next(self.batches)
        self.model.train()
        tokens = int(inputs["attention_mask"].sum())
        self.trainer.training_step(self.model, inputs)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return tokens

    def loss(self, examples: Sequence[Example]) -> float:
        """Return the loss of a batch of examples."""
        rows = [row | {"labels": labels_of(row)} for row in rows_of(examples)]  # as TRL prepares its data set
        inputs = self.trainer.data_collator(rows)
        self.model.eval()
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.model, inputs))


def measure(ways: dict[str, Step], rounds: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return the medians of tokens per second and per CPU-second of each way; the ways take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for step in ways.values():
        step()
    for _ in range(rounds):
        for name, step in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(step() for _ in range(steps))
            found[name].append((tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)))
            print(f"  {name}: {found[name][-1][0]:.1f} tokens/s, {found[name][-1][1]:.1f} a CPU-second", flush=True)
    return {
        name: (statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows))
        for name, rows in found.items()
    }


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Check the losses, measure all ways and return their medians; see `measure`."""
    examples = examples_of(arguments.model, arguments.data, arguments.seq_len)
    files = {each.origin.file: 0 for each in examples}
    record = write_split(folder, "train", "uint16", examples, files)
    stored = ExampleSet(folder, "train", record, "uint16", list(files))
    num_rows = len(pack(stored.example_lengths, arguments.seq_len))
    batch = max(1, round(len(examples) / num_rows * arguments.rows))
    print(f"{len(examples)} examples in {num_rows} rows of {arguments.seq_len}; TRL takes {batch} a step")
    theirs = Theirs(arguments.model, examples, batch, arguments.seq_len) if arguments.peer == "trl" else None
    weights = dict(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=600)
    spec = spec_of(arguments.model, arguments, arguments.rows)
    packed, apart = (Ours(spec, mesh, stored, weights, packed=is_packed) for is_packed in (True, False))
    ways: dict[str, Step] = {"trimaran packed": packed.step, "trimaran padded": apart.step}
    if theirs is not None:
        shared = packed.examples_of_step(0)
        losses = packed.loss(0), theirs.loss([examples[number] for number in shared])
        print(f"loss of one batch of {len(shared)} examples: trimaran {losses[0]:.7f}, TRL {losses[1]:.7f}", flush=True)
        assert abs(losses[0] - losses[1]) < 1e-5 * abs(losses[1]), "the two learn other things"
        ways["TRL padded"] = theirs.step
    medians = measure(ways, arguments.rounds, arguments.steps)
    mesh.close()
    dist.destroy_process_group()
    return medians


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        medians = compare(arguments, Path(folder))
    base = list(medians)[-1]
    for name, (wall, cpu) in medians.items():
        ratios = f"{wall / medians[base][0]:.2f} x {base}, {cpu / medians[base][1]:.2f} x by CPU time"
        print(f"{name}: {wall:.1f} tokens/s, {cpu:.1f} a CPU-second ({ratios})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
