"""Evaluation on a CPU: trimaran's engine against transformers, as lm-eval runs it, and against itself at other layouts.

    python benchmarks/evaluate.py likelihoods --model FOLDER --data FOLDER    arc_easy, HellaSwag and MMLU, against hf
    python benchmarks/evaluate.py generation --model FOLDER --data FOLDER     answers to gsm8k, against hf
    python benchmarks/evaluate.py layouts --model FOLDER --data FOLDER        ranks of one thread beside one process
    python benchmarks/evaluate.py in-loop --data FOLDER                       while a run trains, beside on its own
    python benchmarks/evaluate.py compare --model FOLDER --data FOLDER        every answer beside that of lm-eval's hf
    python benchmarks/evaluate.py MODE --smoke

FOLDER of --model has config.json and safetensors; that of --data has the evaluation sets (docs/evaluation-sets.md). For
likelihoods and layouts these are {query, choices, gold} as arc_easy.jsonl and hellaswag/val.jsonl.gz and
{subject, question, choices, gold} as mmlu/dev.jsonl and mmlu/test.jsonl.gz. All modes compute in float32.

likelihoods: both score the same token ids with the same weights. The peer does what lm-eval's `hf` does: it sorts by
length, pads batches of 16, takes the log-softmax of all logits, and runs a context once where all its continuations
have one token. The two take turns, so that a slow moment meets both; medians are printed. That the scores are equal is
checked first. A ratio above 1 says that trimaran is faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluate_bench import compare, generation, in_loop, layouts
from evaluate_bench.questions import questions, requests_of, smoke_requests

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.batches import Limits, batches, inputs_of
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Likelihood
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import at_layout, load_stages
from trimaran.runtime.huggingface.importing import imported_spec
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.infer.packing import pack_weights
from trimaran.runtime.mesh import lone_mesh

Way = Callable[[Sequence[Likelihood]], list[tuple[float, bool]]]
PEERS_BATCH = 16
TOLERANCE = (
    5e-5  # nats a token: torch's float32 log_softmax over 49,152 logits alone is off by 2e-5, always to one side
)
MODES = ("likelihoods", "generation", "layouts", "in-loop", "compare")
ASKED = ("arc_easy", "hellaswag", "mmlu")


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
    stages = load_stages(folder, spec, mesh, torch.device("cpu"))
    pack_weights(stages, mesh)
    scorer = Scorer(Engine(stages, mesh, spec))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def ours(requests: Sequence[Likelihood]) -> list[tuple[float, bool]]:
        return [(score.log_likelihood, score.is_greedy) for score in scorer.likelihoods(requests)]

    return {"ours": ours, "theirs": lambda requests: as_lm_eval(model, requests)}, spec.transformer.max_seq_len


def smoke_folder(folder: Path, context: int = 2048) -> Path:
    """Write a tiny model into the folder, with a tokenizer of letters; return the folder."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        eos_token_id=0,
        bos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer.train(["What has Ann seen on day 1? a red boat"], 300).save(folder / "tokenizer.json")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def smoke_data(folder: Path) -> Path:
    """Write a few documents of two tasks; return the folder."""
    questions = [{"query": f"Question: day {n}?", "choices": ["a", "red boat"], "gold": n % 2} for n in range(4)]
    sums = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]
    for name, rows in (("arc_easy", questions), ("gsm8k_test", sums), ("gsm8k_train", sums)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def likelihoods(options: argparse.Namespace) -> None:
    """Measure log-likelihoods against transformers, and print the table."""
    print("| task | requests | tokens of hf | ours | hf s | ours s | hf requests/s | ours | ratio | cpu ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    ways, most = both_ways(options.model)
    if options.smoke:
        tasks = {"smoke": smoke_requests()}
    else:
        tokenizer = Tokenizer.load(options.model / "tokenizer.json")
        tasks = {
            task: requests_of(tokenizer, questions(options.data, task, options.documents), most)
            for task in options.tasks or ASKED
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
        print(f"| {task} | {count} | {figures} | {rates} | {theirs.cpu_seconds / ours.cpu_seconds:.2f} |", flush=True)


def run(options: argparse.Namespace, scratch: Path) -> int:
    """Run the mode that was asked for; return the exit code."""
    documents, tasks = options.documents, options.tasks
    if options.mode == "generation":
        generation.run(options.model, options.data, documents, options.new_tokens, options.repeats, options.shots)
    elif options.mode == "layouts":
        words = ["--model", options.model, "--documents", documents, "--tasks", *(tasks or ASKED)]
        words += ["--smoke"] if options.smoke else ["--data", options.data]
        arguments = ["layouts", *map(str, words)]
        layouts.run(__file__, options.layouts or layouts.LAYOUTS, options.threads, options.repeats, arguments)
    elif options.mode == "in-loop":
        in_loop.run(options.preset, options.context, options.data, tasks or ["arc_easy"], documents, options.repeats)
    elif options.mode == "compare":
        keep = options.keep or scratch / "answers"
        asked = compare.Asked(options.model, options.data, documents, options.new_tokens)
        return compare.run(asked, tasks or compare.TASKS, options.layouts or ["1"], options.batch_sizes, keep)
    else:
        likelihoods(options)
    return 0


def main() -> int:
    """Measure, and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=MODES, default=MODES[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--documents", type=int, default=100, help="of each task")
    parser.add_argument("--threads", type=int, default=2, help="of both; of layouts the threads of all ranks together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", help="1, tp2, pp2, dp2, tp2-pp2-dp2, ...")
    parser.add_argument("--batch-sizes", nargs="+", default=["auto"], help="of compare, such as auto 1 7")
    parser.add_argument("--keep", type=Path, help="of compare: a folder of answers, to go on in after a stop")
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer to gsm8k")
    parser.add_argument("--shots", type=int, default=5, help="of generation")
    parser.add_argument("--preset", default="gpt2-124m", help="of in-loop: the shape of the model that trains")
    parser.add_argument("--context", type=int, default=512, help="of in-loop")
    parser.add_argument("--rank-of", help="the benchmark's own: be a rank of this layout")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that the benchmark runs")
    options = parser.parse_args()
    if options.rank_of is not None:
        data = None if options.smoke else options.data
        layouts.run_rank(options.rank_of, options.model, data, options.tasks, options.documents)
        return 0
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            for name in ("model", "data"):
                (Path(scratch) / name).mkdir()
            options.model = smoke_folder(Path(scratch) / "model")
            options.data, options.documents, options.new_tokens = smoke_data(Path(scratch) / "data"), 3, 4
            options.preset, options.context, options.shots = "gpt-tiny", 128, 1
        return run(options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
