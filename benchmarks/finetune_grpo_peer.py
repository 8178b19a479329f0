"""Steps of GRPO a minute on a CPU in one process: trimaran against TRL's GRPOTrainer with transformers' generation.

    python benchmarks/finetune_grpo_peer.py [--prompts 4] [--group 8] [--new-tokens 64] [--steps 5] [--profile]

Both sample as many answers of as many tokens to the same prompts from the same weights, a LLaMA-like model of random
ones (so that answers hardly ever end early), reward them, and take one optimizer step: float32, AdamW, no reference.
That a forward pass of both gives the same log-probabilities is checked first. The two take turns step by step, so that
a slow moment meets both; medians are printed, in wall time and in CPU time, which is less disturbed by what else the
machine does. --profile prints where the time of ours goes. Needs trl (pip install trl==1.16.0).
"""

import argparse
import cProfile
import json
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.records import Origin, Prompt
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.finetune.rl.loop import Inputs, train_on_rewards
from trimaran.runtime.finetune.rl.prompts import PromptSet
from trimaran.runtime.finetune.rl.recording import ForwardOnly, Recorder
from trimaran.runtime.huggingface.exporting import ExportOptions, export_model
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import TrainState, save_state
from trimaran.runtime.train.train_context import TrainContext, build_train_context

LR = 1e-6


def spec_of(arguments: argparse.Namespace, folder: Path, **sections: Any) -> RunSpec:
    """Return the spec of a run of ours."""
    answers = arguments.prompts * arguments.group
    shape = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_heads": arguments.hidden // 32,
        "num_kv_heads": arguments.hidden // 32,
        "ffn_hidden_size": 8 * arguments.hidden // 3 // 8 * 8,
        "vocab_size": arguments.vocab,
        "max_seq_len": arguments.prompt_tokens + arguments.new_tokens,
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
    }
    train = {"num_steps": arguments.steps + 1, "global_batch_size": answers, "micro_batch_size": arguments.micro}
    return parse_spec(
        {
            "model": shape,
            "data": {"source": ["prompts.jsonl"], "tokenizer": "tokenizer.json"},
            "optimizer": {"lr": LR},
            "lr_schedule": {"name": "constant", "warmup_steps": 0},
            "train": {**train, "seq_len": shape["max_seq_len"], "output_dir": str(folder)},
            "logging": {"tensorboard": False, "interval": 1_000_000},
            "launcher": {"device": "cpu"},
            **sections,
        }
    )


def made_prompts(arguments: argparse.Namespace) -> tuple[Tokenizer, list[list[int]]]:
    """Return a tokenizer of words of random letters, and prompts of such words."""
    draw = random.Random(7)
    words = ["".join(draw.choices("aeiounrstlm", k=draw.randrange(2, 9))) for _ in range(20_000)]
    tokenizer = Tokenizer.train([" ".join(words)], arguments.vocab)
    assert tokenizer.vocab_size == arguments.vocab, f"the words make no more than {tokenizer.vocab_size} tokens"
    texts = [" ".join(draw.choices(words, k=arguments.prompt_tokens)) for _ in range(4 * arguments.prompts)]
    return tokenizer, [tokenizer.encode(text)[: arguments.prompt_tokens] for text in texts]


def check_same(context: TrainContext, model: Any, prompts: Sequence[list[int]]) -> None:
    """Raise AssertionError where the two give the tokens of the prompts other log-probabilities."""
    size = context.spec.train.global_batch_size
    chosen = [prompts[number % len(prompts)] for number in range(size)]
    rows = Rows.of([prompt[:1] for prompt in chosen], [prompt[1:] for prompt in chosen], 1)
    passes = ForwardOnly(context.spec, context.mesh, context.stages, context.evaluator)
    ours = passes.record(rows, Recorder(1.0))[0]
    with torch.no_grad():
        logits = model(input_ids=rows.tokens).logits.double()
    theirs = logits.log_softmax(-1).gather(2, rows.labels.clamp(min=0)[..., None])[..., 0]
    gap = float(((ours - theirs) * rows.mask).abs().max())
    print(f"log-probabilities of the prompts differ by at most {gap:.1e}", flush=True)
    assert gap < 1e-4, "the two hold other weights"


class Theirs:
    """TRL's trainer on the same prompts."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, texts: Sequence[str], eot: str) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        self.model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
        files = str(folder / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=files, eos_token=eot, pad_token=eot)
        config = GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=arguments.prompts * arguments.group,
            num_generations=arguments.group,
            max_completion_length=arguments.new_tokens,
            learning_rate=LR,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="grpo",
            max_steps=1_000_000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            self.model,
            reward_funcs=[lambda completions, **_: [float(len(set(text))) for text in completions]],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
        )
        self.trainer.create_optimizer_and_scheduler(1_000_000)
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(self.trainer.get_train_dataloader())
        self.tokens = 0

    def step(self) -> None:
        """Sample, reward, and take the optimizer step, as the trainer does."""
        try:
            inputs = next(self.batches)
        except StopIteration:
            self.batches = iter(self.trainer.get_train_dataloader())
            inputs = next(self.batches)
        self.model.train()
        self.trainer.training_step(self.model, inputs, None)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.tokens += int(self.trainer._buffered_inputs[0]["completion_mask"].sum())


class Turns:
    """Times the steps of a run of ours, and between them those of the other: what the loop calls before each step.

    Attributes:
        times: name -> (seconds, seconds of CPU) of each step.
    """

    def __init__(self, other: Callable[[], None], steps: int) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {"trimaran": [], "TRL": []}
        self._other, self._steps, self._since, self._begun = other, steps, (0.0, 0.0), 0

    def __call__(self, step: int, saves: bool) -> None:
        """End the step before; take the other's, and begin one. See `train_on_rewards`."""
        if self._begun and len(self.times["trimaran"]) < self._begun:
            self._end("trimaran")
        if not saves and self._begun < self._steps and step > self._begun:
            self._start()
            self._other()
            self._end("TRL")
            self._begun = step
            self._start()

    def _start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def _end(self, name: str) -> None:
        wall, cpu = self._since
        self.times[name].append((time.perf_counter() - wall, time.process_time() - cpu))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Take turns, and return the times of the steps of both, without the first ones."""
    tokenizer, tokens = made_prompts(arguments)
    start, mesh, device = folder / "start", lone_mesh(), torch.device("cpu")
    context = build_train_context(spec_of(arguments, start), mesh, device)
    save_state(context, TrainState(1))
    for place in (folder, start):
        tokenizer.save(place / "tokenizer.json")
    theirs = None
    texts = [tokenizer.decode(each) for each in tokens]
    if arguments.peer == "trl":
        export_model(start, folder / "exported", ExportOptions(family="llama"))
        theirs = Theirs(arguments, folder, texts, tokenizer.decode([tokenizer.eot_id]))
        check_same(context, theirs.model, tokens)
    settings = {
        "rewards": ["regex:^ ?[a-m]", "length:40*0.1"],
        "group_size": arguments.group,
        "prompts_per_step": arguments.prompts,
        "max_new_tokens": arguments.new_tokens,
    }
    spec = spec_of(
        arguments,
        folder / "rewarded",
        finetune={"method": "rl", "rl": settings},
        checkpoint={"init_from": str(start), "interval": 0},
    )
    records = [Prompt((), Origin("prompts.jsonl", line)) for line in range(1, len(tokens) + 1)]
    inputs = Inputs(PromptSet(records, tokens), tokenizer, (tokenizer.eot_id,), "prompts")
    turns = Turns(theirs.step if theirs is not None else lambda: None, arguments.steps + 1)
    profile = cProfile.Profile()
    with StopRequest() as stop:
        if arguments.profile:
            profile.enable()
        train_on_rewards(spec, mesh, device, inputs, stop, turns)
        profile.disable()
    if arguments.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    rollouts = (folder / "rewarded" / "rollouts.jsonl").read_text().splitlines()
    sampled = sum(json.loads(line)["tokens"] for line in rollouts)
    print(f"answers' tokens: trimaran {sampled}, TRL {theirs.tokens if theirs is not None else 0}")
    return {name: times[1:] for name, times in turns.times.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table, and return the medians of the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "hidden": 256, "vocab": 4096, "prompts": 4, "group": 8, "micro": 8}
    for name, value in {**sizes, "prompt-tokens": 32, "new-tokens": 64, "steps": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        times = compare(arguments, Path(folder))
    found = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
    print("| | s a step | steps a minute | CPU s a step | ratio | ratio by CPU |")
    print("|---|---|---|---|---|---|")
    base = found["TRL"]
    for name, (wall, cpu) in found.items():
        ratios = f"{base[0] / wall:.2f} | {base[1] / cpu:.2f}"
        print(f"| {name} | {wall:.2f} | {60 / max(wall, 1e-9):.1f} | {cpu:.2f} | {ratios} |")
    return {name: medians[0] for name, medians in found.items()}


if __name__ == "__main__":
    main()
