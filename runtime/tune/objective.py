"""What a run folder says of a trial: its held-out losses so far, and the figure of each objective. Imports no torch."""

import difflib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimaran.models.fields import FieldError
from trimaran.runtime.evaluate.results import FOLDER, RESULTS, score_row
from trimaran.runtime.evaluate.tasks.catalog import ALIASES, MEANS, figures_of_task
from trimaran.runtime.files import read_json
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.metrics import Row, read_metrics
from trimaran.runtime.tune.study import CurvePoint, Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection, TuneSpec


def rows_of(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics, none where it has not begun."""
    try:
        return read_metrics(folder / "metrics.jsonl")
    except FileNotFoundError:
        return []


def curve_of(rows: Sequence[Row], spec: RunSpec) -> tuple[CurvePoint, ...]:
    """Return the held-out losses of a run."""
    found = []
    for row in rows:
        loss = row.get("held_out_loss")
        if loss is not None:
            step = int(row["step"] or 0)
            found.append(CurvePoint(step=step, tokens=step * spec.tokens_per_step, held_out_loss=loss))
    return tuple(found)


def last_step(rows: Sequence[Row]) -> int:
    """Return the last finished step of a run."""
    return max((int(row["step"] or 0) for row in rows if "loss" in row), default=0)


def with_progress(trial: Trial, spec: RunSpec, rows: Sequence[Row], until: int | None = None) -> Trial:
    """Return a trial with what its run has done, up to a step.

    Args:
        rows: of its metrics.
        until: the step; None for the last one.
    """
    step = last_step(rows) if until is None else until
    tokens = step * spec.tokens_per_step
    curve = tuple(point for point in curve_of(rows, spec) if point.step <= step)
    flops = spec.transformer.flops_per_token(spec.train.seq_len) * tokens
    return trial.model_copy(update={"curve": curve, "tokens": tokens, "flops": flops})


def figures_of(
    objectives: Sequence[ObjectiveSection], trial: Trial, folder: Path, rows: Sequence[Row]
) -> tuple[float, ...] | None:
    """Return the figure of each objective; None where the run has one not, or not yet.

    Args:
        trial: with its progress.
    """
    found = []
    for objective in objectives:
        figure = _figure(objective.metric, trial, folder, rows)
        if figure is None or not math.isfinite(figure):
            return None
        found.append(figure)
    return tuple(found)


def _figure(metric: str, trial: Trial, folder: Path, rows: Sequence[Row]) -> float | None:
    if metric == "tokens_per_second":
        # The median leaves out the first steps of a start, which also compile and warm up.
        speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
        return statistics.median(speed for speed in speeds if speed is not None) if speeds else None
    if metric in ("held_out_loss", "bits_per_byte"):
        loss = trial.curve[-1].held_out_loss if trial.curve else None
        return loss if loss is None or metric == "held_out_loss" else loss * _tokens_per_byte(folder) / math.log(2)
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return values[-1] if values else _of_results(metric, folder)


def _tokens_per_byte(folder: Path) -> float:
    """Return the tokens of the held-out text for each of its bytes."""
    held_out = read_json(folder / "data_manifest.json")["splits"]["held_out"]
    return float(held_out["tokens"] / held_out["bytes"])


def _of_results(metric: str, folder: Path) -> float | None:
    """Return TASK/METRIC of the newest evaluation in the run folder that has it."""
    files = sorted(folder.glob(f"{FOLDER}/*/{RESULTS}"), key=lambda file: file.stat().st_mtime)
    figures = (score_row(read_json(file)).get(metric) for file in reversed(files))
    return next((figure for figure in figures if figure is not None), None)


def wrong_objectives(tune: TuneSpec, spec: RunSpec) -> list[FieldError]:
    """Return what the search asks for and a trial would not produce.

    Args:
        spec: of a trial.
    """
    found = []
    asks = [(f"objective[{number}].metric", each.metric) for number, each in enumerate(tune.objective)]
    if len(asks) == 1:
        asks = [("objective.metric", asks[0][1])]
    if tune.prune.method != "none":
        asks.append(("prune.method", tune.prune.method))
    for path, metric in asks:
        if metric == "tokens_per_second":
            continue
        if "/" in metric:
            found += _wrong_task(path, metric, spec)
            continue
        needs = "a held-out loss" if path != "prune.method" else "held-out losses"
        if spec.data.held_out_fraction == 0:
            rule = f"needs {needs}, and the trials hold no text out"
            found.append(FieldError(path, rule, metric, f"set data.held_out_fraction above 0 in {tune.base}"))
        if spec.train.eval_interval == 0:
            rule = f"needs {needs}, and the trials never evaluate"
            found.append(FieldError(path, rule, metric, f"set train.eval_interval in {tune.base}"))
    if tune.prune.method != "none" and tune.prune.first_step >= spec.train.num_steps:
        rule = f"must be below train.num_steps ({spec.train.num_steps}), got {tune.prune.first_step}"
        found.append(FieldError("prune.first_step", rule, tune.prune.first_step, "lower it, or train longer"))
    return found


def _wrong_task(path: str, metric: str, spec: RunSpec) -> list[FieldError]:
    task = metric.rpartition("/")[0]
    tasks = spec.evaluation.tasks if spec.evaluation is not None else []
    for each in tasks:
        parts = [*ALIASES.get(each, ()), *(part.name for part in MEANS.get(each, ()))]
        # What the tasks of a file are called is in the file.
        if task == each or task in parts or task.startswith(f"{each}_") or each.endswith((".yaml", ".yml")):
            return list(_wrong_figure(path, metric, task))
    has = f"they evaluate {', '.join(tasks)}" if tasks else "they evaluate no task"
    rule = f"is a metric of the task {task}, and the trials don't run it: {has}"
    fix = "add the task to evaluation.tasks of the base spec, or take held_out_loss"
    return [FieldError(path, rule, metric, fix)]


def _wrong_figure(path: str, metric: str, task: str) -> Iterator[FieldError]:
    figure, known = metric.rpartition("/")[2], figures_of_task(task)
    if known and figure not in known:
        near = difflib.get_close_matches(figure, known, n=1, cutoff=0.3)
        rule = f"has no figure {figure} of the task {task}, which has {', '.join(known)}"
        yield FieldError(path, rule, metric, f"did you mean {task}/{near[0] if near else known[0]}?")


def has_diverged(trial: Trial) -> bool:
    """Return whether a held-out loss of the trial is not finite."""
    return not all(math.isfinite(point.held_out_loss) for point in trial.curve)
