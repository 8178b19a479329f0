"""Paired differences between two models on the same documents, with intervals by the bootstrap.

The documents of a task are drawn with replacement, the same ones for both models, and the 2.5th and 97.5th percentile
of the differences are the interval (Efron and Tibshirani 1993, section 13.3). A task's figure is a mean over its
documents, or a ratio of two sums (perplexity of words); the differences of a group are those of its tasks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimaran.runtime.evaluate.bootstrap import (
    RESAMPLES,
    Array,
    as_pairs,
    generator_of,
    interval_of,
    resampled,
    transformed,
)
from trimaran.runtime.evaluate.results import TEXT, Evaluation
from trimaran.runtime.evaluate.tasks.catalog import MEANS
from trimaran.runtime.evaluate.text import OF_TOKENS

Figure = tuple[str, str, str]
"""Task or group, metric, and filter."""


@dataclass(frozen=True)
class PairedDifference:
    """The difference of one figure between two models.

    Args:
        difference: other minus first.
        interval: 95% interval of the difference; None for a single document.
        documents: that both have answered.
    """

    task: str
    metric: str
    filter: str
    first: float
    other: float
    difference: float
    interval: tuple[float, float] | None
    documents: int

    @property
    def verdict(self) -> str:
        """What the interval shows, in words."""
        if self.interval is None:
            return "one document shows no interval"
        low, high = self.interval
        if low <= 0 <= high:
            return "no difference shown"
        return "higher" if low > 0 else "lower"


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Args:
        notes: sentences about what can't be compared, and what differs beside the weights.
    """

    first: str
    other: str
    differences: Sequence[PairedDifference]
    notes: Sequence[str]


def compare(first: Evaluation, other: Evaluation, *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Return the paired differences of all figures that both evaluations have.

    Args:
        seed: of the draws; the same evaluations and seed give the same intervals.

    Raises:
        ValueError: a task has other documents in the two.
    """
    found: dict[Figure, tuple[PairedDifference, Array]] = {}
    notes = _notes(first, other)
    same_tokenizer = first.results["hashes"].get("tokenizer") == other.results["hashes"].get("tokenizer")
    for task in first.samples:
        if task not in other.samples:
            notes.append(f"{task} was evaluated for {first.name} alone")
            continue
        pairs = _paired(task, first, other)
        differ = sum(left["prompt_hash"] != right["prompt_hash"] for left, right in pairs)
        if differ:
            notes.append(f"{task}: {differ:,} of {len(pairs):,} prompts differ, by few-shot examples or chat template")
        for (metric, name), (left, right) in _columns(pairs).items():
            if task == TEXT and metric in OF_TOKENS and not same_tokenizer:
                notes.append(
                    f"{metric} of {task} is not compared: the tokenizers differ, and with them what a token is"
                )
            elif not (
                _is_aggregate(first, task, metric, name, left) and _is_aggregate(other, task, metric, name, right)
            ):
                notes.append(f"{metric} of {task} is not compared: it is no mean over documents")
            else:
                found[task, metric, name] = _difference(task, metric, name, left, right, seed, resamples)
    notes += [f"{task} was evaluated for {other.name} alone" for task in other.samples if task not in first.samples]
    for figure, members in _figures_of_groups(first.results):
        notes += _add_group(figure, members, first, other, found)
    order = {name: number for number, name in enumerate(first.results["results"])}
    rows = sorted((row for row, _ in found.values()), key=lambda row: order.get(row.task, len(order)))
    names = [each.name for each in (first, other)]
    if names[0] == names[1]:
        names = [f"{each.results['checkpoint']['model']}, {each.name}" for each in (first, other)]
    return Comparison(names[0], names[1], rows, notes)


def _notes(first: Evaluation, other: Evaluation) -> list[str]:
    notes = []
    for name, one, two in (
        ("--limit", first.limit, other.limit),
        ("lm-eval", first.results["software"].get("lm_eval"), other.results["software"].get("lm_eval")),
    ):
        if one != two:
            notes.append(f"{name} differs: {one} for {first.name}, {two} for {other.name}")
    return notes


def _paired(task: str, first: Evaluation, other: Evaluation) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the two records of each document and filter, in the first's order; ValueError where they differ."""
    left, right = (
        {(sample["doc_id"], sample["filter"]): sample for sample in each.samples[task]} for each in (first, other)
    )
    remedy = "evaluate both with the same --data and --limit"
    if left.keys() != right.keys():
        document, _ = next(iter(left.keys() ^ right.keys()))
        raise ValueError(
            f"{task}: {first.name} has answers to {len(left):,} documents and {other.name} to {len(right):,}; document "
            f"{document} is in one alone; {remedy}"
        )
    for (document, _), sample in left.items():
        if sample["doc_hash"] != right[document, sample["filter"]]["doc_hash"]:
            raise ValueError(
                f"{task}: document {document} of {first.name} is another than that of {other.name}; {remedy}"
            )
    return [(sample, right[key]) for key, sample in left.items()]


def _columns(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> dict[tuple[str, str], tuple[Array, Array]]:
    """Return (metric, filter) -> the values of both models [documents, 2], of metrics that are numbers."""
    by_filter: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for pair in pairs:
        by_filter.setdefault(pair[0]["filter"], []).append(pair)
    found = {}
    for name, rows in by_filter.items():
        for metric in rows[0][0]["metrics"]:
            columns = [[row[side].get(metric) for row in rows] for side in (0, 1)]
            if all(_is_value(value) for column in columns for value in column):
                found[metric, name] = (as_pairs(columns[0]), as_pairs(columns[1]))
    return found


def _is_value(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(isinstance(each, int | float) for each in value)
    return isinstance(value, int | float)


def _is_aggregate(evaluation: Evaluation, task: str, metric: str, name: str, values: Array) -> bool:
    """Whether the figure that was reported is what `aggregate` makes of the documents; F1 and BLEU are not."""
    reported = evaluation.results["results"][task].get(f"{metric},{name}")
    sums = values.sum(axis=0)
    if not isinstance(reported, int | float) or not sums[1]:
        return False
    return math.isclose(transformed(metric, sums[0] / sums[1]), reported, rel_tol=1e-6, abs_tol=1e-9)


def _difference(
    task: str, metric: str, name: str, left: Array, right: Array, seed: int, resamples: int
) -> tuple[PairedDifference, Array]:
    """Return the difference, and that of each resample."""
    both = np.concatenate([left, right], axis=1)
    drawn = resampled(both, generator_of(seed, f"{task} {metric} {name}"), resamples)
    differences = _side(metric, drawn, 1) - _side(metric, drawn, 0)
    one, two = (float(_side(metric, both.sum(axis=0, keepdims=True), side)[0]) for side in (0, 1))
    interval = interval_of(differences) if len(left) > 1 else None
    return PairedDifference(task, metric, name, one, two, two - one, interval, len(left)), differences


def _side(metric: str, sums: Array, side: int) -> Array:
    found: Array = transformed(metric, sums[:, 2 * side] / sums[:, 2 * side + 1])
    return found


def _figures_of_groups(results: Mapping[str, Any]) -> Iterator[tuple[Figure, list[Figure]]]:
    """Yield the figures of groups with those of their members, the innermost groups first; the means of groups last."""
    children: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        for child in children.get(name, ()):
            visit(child)
        if name in children and name in results["results"]:
            order[name] = None

    for name in children:
        visit(name)
    for group in order:
        for key, value in results["results"][group].items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield (group, metric, name), [(member, metric, name) for member in children[group]]
    for mean in MEANS.keys() & results["results"].keys():
        yield (mean, "mean", "none"), [_figure(part.name, part.metric) for part in MEANS[mean]]


def _figure(task: str, key: str) -> Figure:
    metric, _, name = key.partition(",")
    return task, metric, name


def _add_group(
    figure: Figure,
    members: Sequence[Figure],
    first: Evaluation,
    other: Evaluation,
    found: dict[Figure, tuple[PairedDifference, Array]],
) -> list[str]:
    """Add the difference of a group's figure to `found`, or return a sentence on why it can't be compared."""
    group, metric, name = figure
    one, two = (each.results["results"].get(group, {}).get(f"{metric},{name}") for each in (first, other))
    parts = [found[member] for member in members if member in found]
    is_known = len(parts) == len(members) and all(isinstance(value, int | float) for value in (one, two))
    weights = _weights(one, parts) if is_known else None
    if weights is None:
        return [f"{metric} of {group} is not compared: it is no mean of what both have of its tasks"]
    drawn = np.average([each for _, each in parts], axis=0, weights=weights)
    interval = interval_of(drawn) if all(part.interval for part, _ in parts) else None
    documents = sum(part.documents for part, _ in parts)
    row = PairedDifference(group, metric, name, one, two, two - one, interval, documents)
    found[figure] = (row, drawn)
    return []


def _weights(value: float, parts: Sequence[tuple[PairedDifference, Array]]) -> list[float] | None:
    """Return the weight of each task in a group's figure: by documents, or all equal; None where it is neither."""
    documents = [part.documents for part, _ in parts]
    for weights in ([count / sum(documents) for count in documents], [1 / len(parts)] * len(parts)):
        mean = sum(weight * part.first for weight, (part, _) in zip(weights, parts, strict=True))
        if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
            return weights
    return None
