"""GRPO on a task that can be counted: copy the digit of the prompt, from answers that are right less than one in five.

    python -P benchmarks/finetune_grpo.py [--seeds 1,2,3] [--steps 400] [--pretraining 400]

A small model first learns the form of an answer from texts in which the digit after the colon is a random one, but in a
few. Then GRPO has nothing but the reward exact_match. The accuracy is the mean reward of sampled answers, at
temperature 1, before the first and after the last update. finetune.rl.kl holds the model near its start:
without it some seeds forget how an answer ends before they have seen enough rewards, and never get one again.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimaran.models.batch import Microbatch
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.records import Origin, Prompt, Turn
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.finetune.rl.loop import Inputs, train_on_rewards
from trimaran.runtime.finetune.rl.prompts import PromptSet
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import TrainState, save_state
from trimaran.runtime.train.train_context import build_train_context, train_step

PROMPTS, GROUP, RIGHT, KL = 10, 32, 0.06, 0.03
"""RIGHT: share of the pretraining texts whose digit is copied; the others have a random one."""
MODEL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 257, "max_seq_len": 16}


@dataclass(frozen=True)
class Learned:
    """Accuracies of one seed, those on the way at every tenth of the updates, and the seconds of the updates."""

    seed: int
    before: float
    after: float
    tenths: list[float]
    seconds: float


def spec_of(folder: Path, seed: int, steps: int, lr: float, **sections: Any) -> RunSpec:
    """Return the spec of a run of this benchmark."""
    return parse_spec(
        {
            "model": MODEL,
            "data": {"source": ["prompts.jsonl"], "tokenizer": "tokenizer.json", "tokenizer_vocab_size": 257},
            "optimizer": {"lr": lr},
            "lr_schedule": {"name": "cosine", "warmup_steps": 20, "min_lr_ratio": 0.1},
            "train": {
                "num_steps": steps,
                "global_batch_size": PROMPTS * GROUP,
                "micro_batch_size": PROMPTS * GROUP,
                "seq_len": 16,
                "output_dir": str(folder),
            },
            "logging": {"tensorboard": False, "interval": 1_000_000},
            "seed": seed,
            **sections,
        }
    )


def prompts_of(tokenizer: Tokenizer) -> PromptSet:
    """Return the prompts: each digit."""
    texts = [f"copy {digit}:" for digit in range(PROMPTS)]
    records = [
        Prompt((Turn("user", text),), Origin("digits", line), {"answer": line - 1})
        for line, text in enumerate(texts, 1)
    ]
    return PromptSet(records, [tokenizer.encode(text) for text in texts])


def pretraining_batches(tokenizer: Tokenizer, prompts: PromptSet, steps: int, seed: int) -> Iterator[Microbatch]:
    """Yield batches of texts, whose answers are learned."""
    draws = random.Random(seed)
    size = 160
    for step in range(steps):
        digits = [draws.randrange(PROMPTS) for _ in range(size)]
        written = [digit if draws.random() < RIGHT else draws.randrange(PROMPTS) for digit in digits]
        answers = [[*tokenizer.encode(str(digit)), tokenizer.eot_id] for digit in written]
        rows = Rows.of([prompts.tokens[digit] for digit in digits], answers, 16)
        yield Microbatch(rows.tokens, rows.labels, step * size)


def pretrain(folder: Path, tokenizer: Tokenizer, steps: int, seed: int) -> None:
    """Train a model on such texts, and write its checkpoint into the folder."""
    spec = spec_of(folder, seed, steps, 3e-3)
    context = build_train_context(spec, lone_mesh(), torch.device("cpu"))
    for batch in pretraining_batches(tokenizer, prompts_of(tokenizer), steps, seed):
        train_step(context, [batch], 3e-3, num_losses=int((batch.labels >= 0).sum()))
    save_state(context, TrainState(steps))
    tokenizer.save(folder / "tokenizer.json")


def learn(folder: Path, seed: int, steps: int, pretraining: int, lr: float = 3e-3) -> Learned:
    """Pretrain, learn from rewards, and return the accuracies; both runs are in the folder."""
    tokenizer = Tokenizer.train([], 257)
    (folder / "pretrained").mkdir(parents=True)
    pretrain(folder / "pretrained", tokenizer, pretraining, seed)
    settings = {
        "rewards": ["exact_match"],
        "group_size": GROUP,
        "prompts_per_step": PROMPTS,
        "max_new_tokens": 4,
        "kl": KL,
    }
    spec = spec_of(
        folder / "rewarded",
        seed,
        steps + 1,  # the last rollout is sampled after that many updates
        lr,
        finetune={"method": "rl", "rl": settings},
        checkpoint={"init_from": str(folder / "pretrained"), "interval": 0},
    )
    inputs = Inputs(prompts_of(tokenizer), tokenizer, (tokenizer.eot_id,), "digits")
    start = time.perf_counter()
    with StopRequest() as stop:
        train_on_rewards(spec, lone_mesh(), torch.device("cpu"), inputs, stop)
    rewards = [float(row["reward"] or 0.0) for row in read_metrics(folder / "rewarded" / "metrics.jsonl")]
    tenths = rewards[:: max(1, steps // 10)]
    return Learned(seed, rewards[0], rewards[-1], tenths, time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> list[Learned]:
    """Print a line for each seed, and one of all as JSON; return the figures."""
    parser = argparse.ArgumentParser(description="GRPO on a task that can be counted.")
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--steps", type=int, default=400, help="updates by GRPO")
    parser.add_argument("--pretraining", type=int, default=400, help="steps before them")
    options = parser.parse_args(arguments)
    found = []
    for seed in map(int, options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            result = learn(Path(folder), seed, options.steps, options.pretraining)
        found.append(result)
        told = f"accuracy {result.before:.1%} -> {result.after:.1%} in {options.steps} steps, {result.seconds:.0f} s"
        print(f"seed {seed}: {told}", flush=True)
    print(json.dumps({"benchmark": "finetune_grpo", "results": [vars(each) for each in found]}))
    return found


if __name__ == "__main__":
    main()
