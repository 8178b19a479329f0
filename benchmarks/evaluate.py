"""Log-likelihoods of multiple-choice questions on a CPU: trimaran's engine against transformers, as lm-eval runs it.

    python benchmarks/evaluate.py --model FOLDER --data FOLDER [--tasks arc_easy hellaswag mmlu] [--documents 100]
                                  [--threads 2] [--repeats 3]
    python benchmarks/evaluate.py --smoke

FOLDER of --model has config.json and safetensors; that of --data has {query, choices, gold} as arc_easy.jsonl and
hellaswag.jsonl.gz and {subject, question, choices, gold} as mmlu-dev.jsonl and mmlu-test.jsonl.gz, under any folders.
Both score the same token ids with the same weights in float32. The peer does what lm-eval's `hf` does: it sorts by
length, pads batches of 16, takes the log-softmax of all logits, and runs a context once where all its continuations
have one token. The two take turns, so that a slow moment meets both; medians are printed. That the scores are equal is
checked first. A ratio above 1 says that trimaran is faster.
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.batches import Limits, batches, inputs_of
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Likelihood
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import at_layout, load_stages
from trimaran.runtime.huggingface.importing import imported_spec
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.mesh import lone_mesh

Way = Callable[[Sequence[Likelihood]], list[tuple[float, bool]]]
PEERS_BATCH = 16
TOLERANCE = (
    5e-5  # nats a token: torch's float32 log_softmax over 49,152 logits alone is off by 2e-5, always to one side
)
LETTERS = "ABCD"


def records(data: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a file of lines of JSON, found by its name."""
    found = next((file for suffix in ("", ".gz") for file in data.glob(f"**/{name}.jsonl{suffix}")), None)
    if found is None:
        raise SystemExit(f"{data} has no {name}.jsonl or {name}.jsonl.gz")
    text = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def with_shots(data: Path, documents: int) -> Iterator[tuple[str, list[str]]]:
    """Return MMLU's questions with five shots each: `documents` in all, of as many subjects as have them whole."""

    def question(record: dict[str, Any]) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=True))
        return f"{record['question'].strip()}\n{choices}\nAnswer:"

    shots: dict[str, list[str]] = {}
    for record in records(data, "mmlu/dev"):
        shots.setdefault(record["subject"], []).append(f"{question(record)} {LETTERS[record['gold']]}\n\n")
    for record in records(data, "mmlu/test")[:documents]:
        subject = record["subject"]
        title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        yield title + "".join(shots[subject]) + question(record), [f" {letter}" for letter in LETTERS]


def questions(data: Path, task: str, documents: int) -> Iterator[tuple[str, list[str]]]:
    """Return (context, continuations) of a task's first documents."""
    if task == "mmlu":
        yield from with_shots(data, documents)
        return
    name, end = {"arc_easy": ("arc_easy", "\nAnswer:"), "hellaswag": ("hellaswag/val", "")}[task]
    for record in records(data, name)[:documents]:
        yield record["query"] + end, [f" {choice}" for choice in record["choices"]]


def requests_of(tokenizer: Tokenizer, asked: Iterator[tuple[str, list[str]]], most: int) -> list[Likelihood]:
    """Return the requests; a context that is too long loses its beginning."""
    made = []
    for context, continuations in asked:
        for continuation in continuations:
            start = tokenizer.encode(context)
            whole = tokenizer.encode(context + continuation)[-most - 1 :]
            length = max(1, len(whole) - len(start))
            made.append(Likelihood(tuple(whole[:-length]), tuple(whole[-length:])))
    return made


@torch.inference_mode()
def as_lm_eval(model: Any, requests: Sequence[Likelihood]) -> list[tuple[float, bool]]:
    """Return the scores as lm-eval's `hf` computes them."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        # lm-eval runs requests of the same inputs once where their continuations have one token.
        key = inputs_of(request) if len(request.continuation) == 1 else (-number - 1, *inputs_of(request))
        alike.setdefault(key, []).append(number)
    order = sorted(alike.values(), key=lambda group: -len(inputs_of(requests[group[0]])))
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), PEERS_BATCH):
        batch = order[start : start + PEERS_BATCH]
        rows = [inputs_of(requests[group[0]]) for group in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        probabilities = model(ids).logits.log_softmax(-1)
        for group, row, each in zip(batch, rows, probabilities, strict=True):
            for number in group:
                targets = torch.tensor(requests[number].continuation)
                part = each[len(row) - len(targets) : len(row)]
                is_greedy = bool((part.argmax(-1) == targets).all())
                found[number] = float(part.gather(1, targets[:, None]).sum()), is_greedy
    return [found[number] for number in range(len(requests))]


@dataclass(frozen=True)
class Figures:
    """Medians of seconds and of CPU seconds."""

    seconds: float
    cpu_seconds: float


def measure(ways: dict[str, Way], requests: Sequence[Likelihood], repeats: int) -> dict[str, Figures]:
    """Return the figures of each way; exit where their scores differ."""
    few = requests[:64]
    ours, theirs = (ways[name](few) for name in ("ours", "theirs"))
    worst = max(abs(a[0] - b[0]) / len(each.continuation) for a, b, each in zip(ours, theirs, few, strict=True))
    if worst > TOLERANCE:
        raise SystemExit(f"log-likelihoods differ by up to {worst:.1e} a token")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            way(requests)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: Figures(*(statistics.median(each[which] for each in measured) for which in (0, 1)))
        for name, measured in times.items()
    }


def both_ways(folder: Path) -> tuple[dict[str, Way], int]:
    """Return both ways to score with the model of a folder, and its context."""
    spec = at_layout(imported_spec(make_plan(ModelFolder.open(folder)), folder), tp=1, pp=1, dp=1)
    mesh = lone_mesh()
    scorer = Scorer(Engine(load_stages(folder, spec, mesh, torch.device("cpu")), mesh, spec))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def ours(requests: Sequence[Likelihood]) -> list[tuple[float, bool]]:
        return [(score.log_likelihood, score.is_greedy) for score in scorer.likelihoods(requests)]

    return {"ours": ours, "theirs": lambda requests: as_lm_eval(model, requests)}, spec.transformer.max_seq_len


def smoke_folder(folder: Path) -> list[Likelihood]:
    """Write a tiny model into the folder; return requests for it."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return [Likelihood((1, 2, 3, number), (choice, number)) for number in range(9) for choice in range(4)]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "hellaswag", "mmlu"])
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that the benchmark runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads")
    print("| task | requests | tokens of hf | ours | hf s | ours s | hf requests/s | ours | ratio | cpu ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            tasks = {"smoke": smoke_folder(Path(scratch))}
            ways, _ = both_ways(Path(scratch))
        else:
            ways, most = both_ways(options.model)
            tokenizer = Tokenizer.load(options.model / "tokenizer.json")
            tasks = {
                task: requests_of(tokenizer, questions(options.data, task, options.documents), most)
                for task in options.tasks
            }
        for task, requests in tasks.items():
            found = measure(ways, requests, options.repeats)
            ours, theirs, count = found["ours"], found["theirs"], len(requests)
            single = {
                inputs_of(each) if len(each.continuation) == 1 else (*each.context, -n): len(inputs_of(each))
                for n, each in enumerate(requests, 1)
            }
            tokens = sum(len(batch.packing.tokens) for batch in batches(requests, Limits(4096)))
            figures = f"{sum(single.values())} | {tokens} | {theirs.seconds:.2f} | {ours.seconds:.2f}"
            rates = f"{count / theirs.seconds:.1f} | {count / ours.seconds:.1f} | {theirs.seconds / ours.seconds:.2f}"
            print(
                f"| {task} | {count} | {figures} | {rates} | {theirs.cpu_seconds / ours.cpu_seconds:.2f} |", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
