"""One self-contained HTML page about an evaluation: scores with intervals, differences to other models, samples."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.evaluate.compare import Comparison, PairedDifference
from trimaran.runtime.evaluate.results import Evaluation, Score, scores_of
from trimaran.runtime.pages.charts import COLORS, Look, Series, intervals, plot
from trimaran.runtime.pages.html import document, grid, notice, section, table, write_page

_SAMPLES = 20
_SHOWN_CHARACTERS = 1500
_WIDTH: Final = 1.96
"""Standard errors on each side of a value that make a 95% interval of a normal distribution."""


def write_evaluation_page(
    path: Path, evaluation: Evaluation, comparisons: Sequence[Comparison] = (), history: Sequence[Evaluation] = ()
) -> Path:
    """Write the page about an evaluation; return its path.

    Args:
        comparisons: of this evaluation with others.
        history: evaluations of the run's checkpoints, this one among them.
    """
    results, scores = evaluation.results, scores_of(evaluation.results)
    documents = sum(each["effective"] for each in results["n-samples"].values())
    headline = (
        f"{counted(len(results['n-samples']), 'task')}, {counted(documents, 'document')} · layout "
        f"{escape(layout_text(results['layout']))} · trimaran evaluate"
    )
    parts = [
        notice("problem", results.get("notes", [])),
        *(_comparison(each) for each in comparisons),
        _history(history),
        section("Scores", _score_table(scores)),
        _intervals(scores),
        *_samples(evaluation),
        section("How it was evaluated", table(_facts(results))),
    ]
    return write_page(path, document(f"Evaluation of {evaluation.name}", headline, parts))


def layout_text(layout: Mapping[str, int]) -> str:
    """Return a layout as "tp 2 × pp 2"; "1 rank" for one."""
    return " × ".join(f"{axis} {size}" for axis, size in layout.items() if size > 1) or "1 rank"


def _score_table(scores: Sequence[Score]) -> str:
    rows = [
        (
            "\N{NO-BREAK SPACE}" * 4 * score.depth + score.alias.strip(" -"),
            _shots(score),
            score.metric + ("" if score.filter == "none" else f" ({score.filter})"),
            number_text(score.value),
            "" if score.stderr is None else f"± {number_text(score.stderr)}",
            "" if score.stderr is None else _range(score.value, score.stderr),
            "" if score.documents is None else f"{score.documents:,}",
        )
        for score in scores
    ]
    return grid(("task", "examples", "metric", "value", "standard error", "95% interval", "documents"), rows)


def _intervals(scores: Sequence[Score]) -> str:
    """Return a picture for each metric that has standard errors, tasks below each other."""
    by_metric: dict[str, list[Score]] = {}
    for score in scores:
        if score.stderr is not None and math.isfinite(score.value) and math.isfinite(score.stderr):
            by_metric.setdefault(score.metric, []).append(score)
    pictures = [
        intervals(
            f"{metric}, 95% intervals",
            [(score.alias, score.value, _WIDTH * (score.stderr or 0.0)) for score in found],
        )
        for metric, found in by_metric.items()
    ]
    return section("Intervals", *pictures) if pictures else ""


def _comparison(found: Comparison) -> str:
    rows = [
        (
            row.task,
            row.metric + ("" if row.filter == "none" else f" ({row.filter})"),
            number_text(row.first),
            number_text(row.other),
            f"{row.difference:+.4g}",
            interval_text(row),
            row.verdict,
            f"{row.documents:,}",
        )
        for row in found.differences
    ]
    names = ("task", "metric", found.first, found.other, "difference", "95% interval", "verdict", "documents")
    meaning = (
        f"Difference: {found.other} minus {found.first}, over the same documents; the interval is that of a bootstrap "
        "over documents. Where it covers 0, the documents show no difference."
    )
    return section(
        f"{found.other} beside {found.first}",
        f'<p class="soft">{escape(meaning)}</p>',
        notice("", found.notes),
        grid(names, rows),
    )


def interval_text(row: PairedDifference) -> str:
    """Return the interval of a difference, "" where it has none."""
    return "" if row.interval is None else f"{row.interval[0]:+.4g} to {row.interval[1]:+.4g}"


def _history(history: Sequence[Evaluation]) -> str:
    """Return a picture of each metric against the tokens of training, a line for each task."""
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]] = {}
    by_tokens = all(each.results["checkpoint"]["tokens_seen"] is not None for each in history)
    for each in sorted(history, key=lambda each: each.results["checkpoint"]["step"] or 0):
        at = float(each.results["checkpoint"]["tokens_seen" if by_tokens else "step"] or 0)
        for score in scores_of(each.results):
            if math.isfinite(score.value) and (score.depth == 0 or not score.is_group):
                of_task = lines.setdefault((score.metric, score.filter), {})
                of_task.setdefault(score.alias.strip(" -"), []).append((at, score.value, score.stderr or 0.0))
    pictures = []
    for number, ((metric, name), of_task) in enumerate(lines.items()):
        drawn = [
            Series(
                [(at, value) for at, value, _ in points], task, COLORS[index % len(COLORS)], "-", dots=True,
                bounds=[(value - _WIDTH * error, value + _WIDTH * error) for _, value, error in points],
            )
            for index, (task, points) in enumerate(of_task.items())
        ]  # fmt: skip
        look = Look("tokens" if by_tokens else "step", metric + ("" if name == "none" else f" ({name})"))
        pictures.append(plot(f"history-{number}", look, drawn))
    return section("Scores of the checkpoints", *pictures) if pictures else ""


def _samples(evaluation: Evaluation) -> Iterator[str]:
    found = []
    for task, samples in evaluation.samples.items():
        rows = [
            (
                str(sample["doc_id"]),
                _cut(json.dumps(sample.get("doc", ""), ensure_ascii=False, default=str)),
                _cut(str(sample.get("target", ""))),
                _cut(str(sample.get("filtered_resps", ""))),
                ", ".join(f"{metric} {_value(sample.get(metric))}" for metric in sample["metrics"]),
            )
            for sample in samples[:_SAMPLES]
        ]
        shown = f"{escape(task)} ({len(rows):,} of {len(samples):,})"
        rows_shown = grid(("document", "content", "target", "answer", "metrics"), rows)
        found.append(f"<details><summary>{shown}</summary>{rows_shown}</details>")
    if found:
        yield section("Documents", *found)


def _facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for title in ("checkpoint", "layout", "config", "software", "hashes"):
        for key, value in results[title].items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{title}, {key}".replace("_", " "), text


def _shots(score: Score) -> str:
    return "" if score.num_fewshot is None else str(score.num_fewshot)


def number_text(value: float) -> str:
    """Return a figure in a few digits."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def _range(value: float, stderr: float) -> str:
    return f"{number_text(value - _WIDTH * stderr)} to {number_text(value + _WIDTH * stderr)}"


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_value, value)) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} …"
