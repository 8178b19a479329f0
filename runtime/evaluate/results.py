"""The results of an evaluation: results.json in lm-eval's schema with a few records more, samples.jsonl, reading back.

lm-eval's keys are `results`, `groups`, `group_subtasks`, `configs`, `versions`, `n-shot`, `higher_is_better`,
`n-samples`, `config` and `date`. Ours are `checkpoint`, `layout`, `software`, `hashes` and `notes`. A line of
samples.jsonl is lm-eval's record of a document and filter, with the name of its `task`. No torch.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.files import parse_json, read_bytes, read_json, write_text

RESULTS, SAMPLES, REPORT = "results.json", "samples.jsonl", "report.html"
JOURNAL: Final = "answers.jsonl"
"""The journal of an evaluation under way; it goes when the command has ended well."""
FOLDER: Final = "evaluations"
"""Folder of a run that holds a folder for each evaluation."""
TEXT: Final = "text"
"""The name of `--text` among the tasks of an evaluation."""
_MOST_BYTES: Final = 8 << 30
_MOST_NAME: Final = 100
_LARGE: Final = ("arguments", "resps")  # prompts: of MMLU with five examples 170 MB


@dataclass(frozen=True)
class Origin:
    """Which weights were evaluated, and how.

    Args:
        model: the folder of the run or of the Hugging Face model.
        step: of the checkpoint, None for a model without one.
        hashes: weights, tokenizer, tasks and data -> digest, or record of digests.
    """

    model: str
    step: int | None
    tokens_seen: int | None
    layout: Mapping[str, int]
    hashes: Mapping[str, Any]
    dtype: str
    device: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found.

    Args:
        results: all of results.json.
        samples: task -> records of its documents.
    """

    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def name(self) -> str:
        """The model and the step, for a reader."""
        checkpoint = self.results["checkpoint"]
        step = "" if checkpoint["step"] is None else f" step {checkpoint['step']}"
        return f"{Path(checkpoint['model']).name}{step}"

    @property
    def limit(self) -> int | float | None:
        """The most documents of a task that were evaluated; None for all."""
        found: int | float | None = self.results["config"].get("limit")
        return found


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return results of several evaluations of one model as one; records are joined, other values are the last's."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, Mapping) else value
    return whole


def evaluation_of(
    found: Mapping[str, Any], origin: Origin, *, config: Mapping[str, Any], notes: Sequence[str] = ()
) -> Evaluation:
    """Return the evaluation of what lm-eval or `text_results` has found.

    Args:
        config: the options of the evaluation, among them `limit`.
        notes: sentences that belong beside the figures, such as how many documents were truncated.
    """
    results = {key: value for key, value in found.items() if key != "samples"}
    results["config"] = {
        **results.get("config", {}),
        "model": "trimaran",
        "model_args": {"path": origin.model},
        "model_dtype": origin.dtype,
        "device": origin.device,
        **config,
    }
    results["checkpoint"] = {"model": origin.model, "step": origin.step, "tokens_seen": origin.tokens_seen}
    results["layout"] = dict(origin.layout)
    results["software"] = dict(software())
    results["hashes"] = dict(origin.hashes)
    results["notes"] = [*limit_notes(results), *notes]
    return Evaluation(results, found.get("samples", {}))


def limit_notes(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence where not all documents were evaluated."""
    counts = {name: each for name, each in results.get("n-samples", {}).items() if each["effective"] < each["original"]}
    if not counts:
        return []
    limit = results["config"].get("limit")
    evaluated, original = (sum(each[key] for each in counts.values()) for key in ("effective", "original"))
    which = f"--limit {limit}" if limit is not None else "part of the documents"
    told = f"{which}: {evaluated:,} of {original:,} documents were evaluated"
    return [f"{told}, so these figures are not those of the whole tasks"]


@cache
def software() -> dict[str, str]:
    """Return the versions of what computes results."""
    found = {"python": platform.python_version()}
    for name in ("trimaran", "torch", "lm_eval", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def evaluation_name(tasks: Sequence[str], step: int | None, options: Mapping[str, Any]) -> str:
    """Return the name of an evaluation's folder: tasks, options that change the figures, and the step.

    Args:
        tasks: names, and files of tasks.
        options: name of an option -> its value; None and false are left out.
    """
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks]
    chosen = [
        f"{name.replace('_', '-')}" + ("" if value is True else f"-{value}")
        for name, value in options.items()
        if value is not None and value is not False
    ]
    whole = re.sub(r"[^\w.+=-]", "_", "-".join(["+".join(names), *chosen]))
    if len(whole) > _MOST_NAME:
        whole = f"{whole[: _MOST_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return whole if step is None else f"{whole}-step-{step}"


def write_evaluation(folder: Path, evaluation: Evaluation, *, with_prompts: bool) -> None:
    """Write results.json and samples.jsonl; earlier ones stay whole until the new ones are.

    Args:
        with_prompts: whether samples hold the prompts and the unfiltered answers too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        _dumped({"task": task, **{key: value for key, value in sample.items() if with_prompts or key not in _LARGE}})
        for task, samples in evaluation.samples.items()
        for sample in samples
    ]
    text = "".join(f"{line}\n" for line in lines)
    digest = hashlib.sha256(text.encode()).hexdigest()
    results = {**evaluation.results, "hashes": {**evaluation.results["hashes"], "samples": digest}}
    write_text(folder / SAMPLES, text)
    write_text(folder / RESULTS, _dumped(results, indent=1) + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        ValueError: a file is not of that form, or the two are of different evaluations.
        OSError: it can't be read.
    """
    path = folder / RESULTS
    try:
        results = read_json(path)
        text = read_bytes(folder / SAMPLES, _MOST_BYTES)
        found = [parse_json(line) for line in text.splitlines()]
        digest = results["hashes"]["samples"]
        for key in ("results", "config", "checkpoint", "layout", "n-samples", "software"):
            results[key]
        samples: dict[str, list[Mapping[str, Any]]] = {}
        for sample in found:
            samples.setdefault(sample["task"], []).append(sample)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} holds no whole evaluation ({error!r}); evaluate again") from error
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"{path} and {SAMPLES} beside it are of different evaluations; evaluate again")
    return Evaluation(results, samples)


@dataclass(frozen=True)
class Score:
    """One figure of a task or group.

    Args:
        stderr: standard error, None where it is not known.
        depth: 0 for a task that is in no group.
        higher_is_better: None where it is not said.
    """

    task: str
    alias: str
    filter: str
    metric: str
    value: float
    stderr: float | None
    documents: int | None
    num_fewshot: int | None
    depth: int
    higher_is_better: bool | None
    is_group: bool


def scores_of(results: Mapping[str, Any]) -> list[Score]:
    """Return every figure of results.json, groups before their tasks."""
    return [score for task, depth in _in_order(results) for score in _scores_of_task(results, task, depth)]


def score_row(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return every figure of results.json by the name that it has in metrics.jsonl, with its standard error."""
    row: dict[str, float | None] = {}
    for score in scores_of(results):
        name = f"{score.task}/{score.metric}" + ("" if score.filter == "none" else f",{score.filter}")
        row[name] = score.value
        if score.stderr is not None:
            row[stderr_name(name)] = score.stderr
    return row


def stderr_name(name: str) -> str:
    """Return the name in metrics.jsonl of the standard error of the figure `name`."""
    figure, comma, name = name.partition(",")
    return f"{figure}_stderr{comma}{name}"


def _scores_of_task(results: Mapping[str, Any], task: str, depth: int) -> Iterator[Score]:
    row = results["results"][task]
    better = results.get("higher_is_better", {}).get(task) or {}
    for key, value in row.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{name}")
        yield Score(
            task=task,
            alias=str(row.get("alias", task)),
            filter=name,
            metric=metric,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            documents=row.get("sample_len"),
            num_fewshot=results.get("n-shot", {}).get(task),
            depth=depth,
            higher_is_better=better.get(metric),
            is_group=task in results.get("group_subtasks", {}),
        )


def _in_order(results: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return (task or group, its depth), each group directly before what it consists of."""
    children: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})
    inner = {child for each in children.values() for child in each}
    order: dict[str, int] = {}

    def visit(name: str, depth: int) -> None:
        if name in order:
            return
        if name in results["results"]:
            order[name] = depth
        for child in children.get(name, ()):
            visit(child, depth + 1)

    for name in [*(each for each in children if each not in inner), *results["results"]]:
        visit(name, 0)
    return list(order.items())


def _dumped(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_encoded)


def _encoded(value: object) -> object:
    """Return what JSON has no form for: numbers of numpy, sets and everything else as lm-eval writes it."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
