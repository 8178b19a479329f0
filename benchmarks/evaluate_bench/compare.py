"""Every answer of `trimaran evaluate` beside that of lm-eval's own `hf` model in float32, at any layout.

Likelihoods must lie within 2e-4 nats of each other, and metrics be equal; a text that differs must part where the two
likeliest tokens have logits within 1e-3 of each other. Where two likelihoods lie further apart, the model in float64
tells: ours must lie within 2e-4 of it. torch's log_softmax in float32 over 49,152 logits is off by 1e-5 a token, always
to one side, which makes 4e-4 of 50 tokens.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.tasks.load import TaskSet, load_tasks
from trimaran.runtime.evaluate.tasks.offline import offline

TASKS: Final = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "mmlu_abstract_algebra",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "lambada",
    "piqa",
    "winogrande",
    "wsc",
    "wsc273",
    "boolq",
    "openbookqa",
    "copa",
    "gsm8k",
)
"""Every task that comes along, of MMLU a subject with 100 questions."""
NATS: Final = 2e-4
LOGITS: Final = 1e-3
_RELATIVE: Final = {True: 1e-4, False: 1e-6}
"""Of LAMBADA's perplexity, and of others: TruthfulQA's mc2 is made of probabilities."""
_PEERS_BATCH: Final = 16
Metrics = Mapping[str, Mapping[str, Any]]
Samples = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Asked:
    """What both are asked.

    Args:
        new_tokens: of an answer that is generated.
    """

    model: Path
    data: Path
    documents: int
    new_tokens: int

    def load(self, names: Sequence[str]) -> TaskSet:
        """Return the tasks of these names."""
        generation = {"max_gen_toks": self.new_tokens} if "gsm8k" in names else None
        return load_tasks(names, self.data, limit=self.documents, generation=generation)

    def with_data(self, names: Sequence[str]) -> list[str]:
        """Return the tasks that the folder has the data of; print the others."""
        found = []
        for name in names:
            try:
                self.load([name])
                found.append(name)
            except DataError as error:
                print(f"{name} is left out: {error}", flush=True)
        return found


@dataclass
class Peer:
    """lm-eval's `hf`, whose answers stay in a folder: a comparison that takes hours can be made in steps.

    Args:
        folder: of the answers, a file a task.
    """

    asked: Asked
    folder: Path

    @cached_property
    def backend(self) -> HFLM:
        """The model, in float32."""
        return HFLM(pretrained=str(self.asked.model), dtype="float32", device="cpu", batch_size=_PEERS_BATCH)

    @cached_property
    def wide(self) -> Any:
        """The model in float64."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.asked.model, dtype=torch.float64)

    @torch.inference_mode()
    def exact(self, context: str, continuation: str) -> float:
        """Return the log-likelihood of a continuation in float64."""
        file = self.folder / f"{self.digest}-float64.json"
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        name = hashlib.sha256(repr((context, continuation)).encode()).hexdigest()
        if name not in known:
            before, after = self.backend._encode_pair(context, continuation)
            tokens = [*before, *after]
            logits = self.wide(torch.tensor([tokens])).logits[0, len(before) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])
            known[name] = float(scores.sum())
            file.write_text(json.dumps(known), encoding="utf-8")
        return known[name]

    @property
    def digest(self) -> str:
        """What stands for the model, the data and the questions in the names of files."""
        return hashlib.sha256(repr(self.asked).encode()).hexdigest()[:8]

    def answers(self, name: str) -> tuple[Metrics, Samples]:
        """Return the metrics and samples of each task that the name stands for."""
        file = self.folder / f"{self.digest}-hf-{name}.json"
        if not file.exists():
            tasks = self.asked.load([name])
            for task in tasks.tasks.values():
                task.set_fewshot_seed(seed=tasks.seed)
            with offline():
                found = evaluate(
                    lm=self.backend,
                    task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
                    limit=self.asked.documents,
                    bootstrap_iters=0,
                )
            assert found is not None
            samples = {
                task: [{key: sample[key] for key in ("doc_id", "filter", "arguments", "resps")} for sample in each]
                for task, each in found["samples"].items()
            }
            # Text that was written in part never bears the name.
            half = file.with_suffix(".tmp")
            half.write_text(json.dumps([found["results"], samples], default=str), encoding="utf-8")
            half.replace(file)
        metrics, samples = json.loads(file.read_text(encoding="utf-8"))
        return metrics, samples


def ours(asked: Asked, names: Sequence[str], options: Sequence[str], folder: Path) -> tuple[dict[str, Any], Samples]:
    """Return metrics and samples of `trimaran evaluate` with these options."""
    if not (folder / "results.json").exists():
        _evaluate(asked, names, options, folder)
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        samples.setdefault(sample["task"], []).append(sample)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"], samples


def _evaluate(asked: Asked, names: Sequence[str], options: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "trimaran.launchers.cli.app", "evaluate", asked.model, "--tasks", ",".join(names)]
    command += ["--data", asked.data, "--limit", str(asked.documents), "--samples", "--output", folder, *options]
    command += ["--gen", f"max_gen_toks={asked.new_tokens}"] if "gsm8k" in names else []
    done = subprocess.run(list(map(str, command)), env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with code {done.returncode}: {done.stderr[-2000:]}")


@dataclass
class Row:
    """One task at one layout.

    Attributes:
        worst: the largest distance of two likelihoods.
        off: of requests whose likelihoods lie further apart than NATS, our largest distance to float64.
        theirs: the peer's, of the same requests.
        greedy: answers that differ in whether they are the likeliest.
        texts: texts that differ beyond a tie.
        metrics: names of metrics that differ.
    """

    requests: int = 0
    worst: float = 0.0
    off: float = 0.0
    theirs: float = 0.0
    greedy: int = 0
    texts: int = 0
    metrics: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the two agree."""
        return self.off <= NATS and not self.texts and not self.metrics


def compare_task(
    wanted: tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]],
    found: tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]],
    peer: Peer,
) -> Row:
    """Return how the metrics and samples of a task differ."""
    row = Row(metrics=tuple(name for name in wanted[0] if _differ(name, wanted[0][name], found[0].get(name))))
    others = {(sample["doc_id"], sample["filter"]): sample for sample in found[1]}
    first = wanted[1][0]["filter"] if wanted[1] else ""
    for sample in (each for each in wanted[1] if each["filter"] == first):
        other = others[sample["doc_id"], first]
        for arguments, one, two in zip(sample["arguments"], sample["resps"], other["resps"], strict=True):
            row.requests += 1
            if isinstance(one[0], str):
                row.texts += one[0] != two[0] and not _parts_at_a_tie(peer.backend, arguments[0], one[0], two[0])
            elif isinstance(one[0], float):  # rolling
                row.worst = max(row.worst, abs(one[0] - two[0]))
            else:
                distance = abs(one[0][0] - two[0][0])
                row.worst = max(row.worst, distance)
                if distance > NATS:
                    exact = peer.exact(*arguments)
                    row.off = max(row.off, abs(two[0][0] - exact))
                    row.theirs = max(row.theirs, abs(one[0][0] - exact))
                row.greedy += bool(one[0][1]) != bool(two[0][1])
    return row


def _differ(name: str, one: Any, two: Any) -> bool:
    if "," not in name or "_stderr" in name or not isinstance(one, int | float):
        return False
    return not isinstance(two, int | float) or abs(one - two) > _RELATIVE["perplexity" in name] * abs(one)


@torch.inference_mode()
def _parts_at_a_tie(backend: HFLM, context: str, one: str, two: str) -> bool:
    """Whether two continuations part where the two likeliest tokens are about equally likely."""
    start = backend.tok_encode(context)
    rows = [backend.tok_encode(context + text)[len(start) :] for text in (one, two)]
    common = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
    ids = torch.tensor([[*start, *rows[0][:common]]])[:, -backend.max_length :]
    best = backend.model(ids).logits[0, -1].topk(2).values
    return float(best[0] - best[1]) <= LOGITS


def options_of(layout: str, batch_size: str) -> list[str]:
    """Return the options of a layout such as tp2-pp2, "1" for one rank, and a batch size."""
    axes = [] if layout == "1" else layout.split("-")
    return [word for axis in axes for word in (f"--{axis[:2]}", axis[2:])] + ["--batch-size", batch_size]


def run(asked: Asked, names: Sequence[str], layouts: Sequence[str], batch_sizes: Sequence[str], keep: Path) -> int:
    """Print a row for each task, layout and batch size; return 1 where one differs.

    Args:
        keep: a folder of the answers of both, which the same comparison does not compute again.
    """
    keep.mkdir(parents=True, exist_ok=True)
    names, peer = asked.with_data(names), Peer(asked, keep)
    columns = (
        "task, layout, batch, documents, requests, worst nats, off float64 (theirs), greedy, texts, metrics, equal"
    )
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    wanted = {name: peer.answers(name) for name in names}
    failed = False
    for layout, size in ((layout, size) for layout in layouts for size in batch_sizes):
        found_metrics, found = ours(asked, names, options_of(layout, size), keep / f"{peer.digest}-{layout}-{size}")
        for metrics, samples in wanted.values():
            for task, answers in samples.items():
                row = compare_task((metrics[task], answers), (found_metrics[task], found[task]), peer)
                documents = len({sample["doc_id"] for sample in answers})
                wide = f"{row.off:.1e} ({row.theirs:.1e})" if row.theirs else ""
                figures = f"{documents} | {row.requests} | {row.worst:.1e} | {wide} | {row.greedy} | {row.texts}"
                told, is_equal = ", ".join(row.metrics) or "equal", "yes" if row.is_equal else "NO"
                print(f"| {task} | {layout} | {size} | {figures} | {told} | {is_equal} |", flush=True)
                failed |= not row.is_equal
    return int(failed)
