"""One self-contained HTML page about a search: what was tried, what mattered, and what a ladder leads to."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from trimaran.launchers.report.ladder_page import ladder_sections
from trimaran.models.fields import counted
from trimaran.runtime.pages.charts import Look, Series, bars, colors, plot
from trimaran.runtime.pages.html import document, grid, notice, section, table, write_page
from trimaran.runtime.tune.extrapolate import Extrapolation
from trimaran.runtime.tune.ladder import FIELDS, Ladder
from trimaran.runtime.tune.outcome import best_trials, shown
from trimaran.runtime.tune.propose import importances
from trimaran.runtime.tune.space import Dimension, Space
from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection

PAGE: Final = "tune.html"
_STATES: Final = ("complete", "pruned", "diverged", "failed", "invalid", "running")
_MOST_ROWS: Final = 200
_MOST_CURVES: Final = 60
_MOST_TICKS: Final = 8
_LABELS: Final = {
    "held_out_loss": "held-out loss (nats a token)",
    "bits_per_byte": "bits a byte",
    "tokens_per_second": "tokens a second",
}


@dataclass(frozen=True)
class SearchResult:
    """What a page is about.

    Args:
        problem: why a ladder leads to nothing yet, "" where it does.
        settings: rows of what was asked for.
    """

    name: str
    objectives: Sequence[ObjectiveSection]
    space: Space
    trials: Sequence[Trial]
    ladder: Ladder | None = None
    extrapolation: Extrapolation | None = None
    problem: str = ""
    settings: Sequence[tuple[str, str]] = ()


def write_tune_page(found: SearchResult, folder: Path) -> Path:
    """Write tune.html into the folder of a study; return its path."""
    counts = Counter(trial.state for trial in found.trials)
    headline = escape(", ".join(f"{counts[state]:,} {state}" for state in _STATES if counts[state]) or "no trial yet")
    problems = [*found.problem.splitlines(), *(found.extrapolation.untold if found.extrapolation else ())]
    parts = [
        notice("problem", problems),
        _best(found),
        *(ladder_sections(found.ladder, found.extrapolation) if found.ladder and found.extrapolation else ()),
        section("Trials by outcome", bars("trials", list(_STATES), [counts[s] for s in _STATES])),
        _history(found),
        _front(found),
        _importance(found),
        _slices(found),
        _rate_by_batch(found),
        _curves(found),
        _trials(found),
        section("The search", table(found.settings)) if found.settings else "",
    ]
    return write_page(folder / PAGE, document(found.name, headline, parts))


def _label_of(objective: ObjectiveSection) -> str:
    """Return an objective as the name of an axis, with its unit."""
    return _LABELS.get(objective.metric, objective.metric)


def _finished(found: SearchResult) -> list[tuple[Trial, tuple[float, ...]]]:
    return [
        (trial, trial.objectives)
        for trial in found.trials
        if trial.state == "complete" and trial.objectives is not None and all(map(math.isfinite, trial.objectives))
    ]


def _groups(found: SearchResult) -> list[str | None]:
    """Return the rungs, which are searched each by itself; None alone without a ladder."""
    return [rung.name for rung in found.ladder.rungs] if found.ladder is not None else [None]


def _best(found: SearchResult) -> str:
    """Return the values and figures of the best trial, of two objectives those of all that none beats in both."""
    if found.ladder is not None or not (best := best_trials(found.objectives, found.trials)):
        return ""
    rows = []
    for trial in best:
        figures = zip(found.objectives, trial.objectives or (), strict=True)
        told = ", ".join(f"{_label_of(objective)} {shown(value)}" for objective, value in figures)
        values = ", ".join(f"{key} {shown(value)}" for key, value in trial.values.items())
        rows.append((f"trial {trial.number}", f"{told}; {values}; run folder {trial.folder}"))
    return section("The best trial" if len(best) == 1 else "The trials that none beats in both", table(rows))


def _history(found: SearchResult) -> str:
    """Draw each objective over the trials in their order, and the best so far, of each rung by itself.

    Diverged and failed trials have no figure, and are in the table alone.
    """
    groups = _groups(found)
    drawn = []
    for index, objective in enumerate(found.objectives):
        better = min if objective.is_better_lower else max
        series = []
        for color, group in zip(["blue"] if len(groups) == 1 else colors(len(groups)), groups, strict=True):
            points = [(float(t.number), values[index]) for t, values in _finished(found) if t.rung == group]
            best = [(x, better(y for _, y in points[: place + 1])) for place, (x, _) in enumerate(points)]
            steps = [point for a, b in pairwise(best) for point in (a, (b[0], a[1]))] + best[-1:]
            series += [Series(points, "", color, alpha=0.6), Series(steps, group or "best so far", color, "-")]
        pruned = [(float(t.number), t.objectives[index]) for t in found.trials if t.state == "pruned" and t.objectives]
        series.append(Series(pruned, "ended early", "slate", marker="x", alpha=0.6))
        caption = "dots: complete trials; line: the best so far" + (", of each rung" if found.ladder else "")
        drawn.append(plot(f"history-{index}", Look("trial", _label_of(objective), caption), series))
    return section("History", *drawn)


def _front(found: SearchResult) -> str:
    """Draw the trials by two objectives, and those of which no other is better in both."""
    if len(found.objectives) != 2:
        return ""
    points = [(values[0], values[1]) for _, values in _finished(found)]
    best = (trial.objectives for trial in best_trials(found.objectives, found.trials))
    front = sorted((each[0], each[1]) for each in best if each is not None)
    series = [
        Series(points, "trials", "pale"),
        Series(front, "Pareto front", "orange", "--", dots=True),
    ]
    look = Look(
        _label_of(found.objectives[0]), _label_of(found.objectives[1]), "a trial of the front is beaten by none in both"
    )
    return section("Pareto front", plot("front", look, series))


def _importance(found: SearchResult) -> str:
    """Draw what explains the first objective, of a ladder at its largest rung."""
    group = _groups(found)[-1]
    heading = "What mattered (fANOVA)"
    try:
        shares = importances(found.objectives, found.space, [trial for trial in found.trials if trial.rung == group])
    except ValueError as error:
        return section(heading, f"<p>{escape(str(error))}</p>")
    if len(shares) < 2:
        return ""
    title = f"percent of the variance of {found.objectives[0].metric}" + (f" in rung {group}" if group else "")
    return section(heading, bars(title, list(shares), [round(100 * share, 1) for share in shares.values()]))


def _slices(found: SearchResult) -> str:
    """Draw the first objective over each dimension."""
    groups = _groups(found)
    shades = ["blue"] if len(groups) == 1 else colors(len(groups))
    drawn = []
    for number, dimension in enumerate(found.space.dimensions):
        place, ticks = _places(dimension)
        series = []
        for color, group in zip(shades, groups, strict=True):
            points = [
                (place(trial.values[dimension.key]), values[0])
                for trial, values in _finished(found)
                if trial.rung == group and dimension.key in trial.values
            ]
            series.append(Series(points, group or "", color, alpha=0.7))
        log = "x" if _is_log(dimension) else ""
        look = Look(dimension.key, _label_of(found.objectives[0]), "", log, ticks=ticks, span=_span(dimension))
        drawn.append(plot(f"slice-{number}", look, series))
    return section("Slices: complete trials over each key of the space", _row(drawn))


def _row(drawn: Sequence[str]) -> str:
    return '<div class="row">' + "".join(f"<div>{each}</div>" for each in drawn) + "</div>"


def _is_log(dimension: Dimension) -> bool:
    if dimension.choices is None:
        return dimension.log
    numbers = [each for each in dimension.choices if type(each) in (int, float)]
    return len(numbers) == len(dimension.choices) and min(numbers) > 0 and max(numbers) >= 8 * min(numbers)


def _places(dimension: Dimension) -> tuple[Any, Mapping[float, str]]:
    """Return what gives the place of a value on an axis, and the names of the places of listed values."""
    if dimension.choices is None:
        return float, {}
    if all(type(each) in (int, float) for each in dimension.choices):
        few = len(dimension.choices) <= _MOST_TICKS
        return float, {float(each): shown(each) for each in dimension.choices} if few else {}
    return dimension.coordinate_of, {float(place): shown(each) for place, each in enumerate(dimension.choices)}


def _span(dimension: Dimension) -> tuple[float, float]:
    """Return the first and the last place of a dimension, also of values that no trial has."""
    if dimension.choices is None:
        return dimension.low, dimension.high
    place, _ = _places(dimension)
    places = [place(each) for each in dimension.choices]
    return min(places), max(places)


def _rate_by_batch(found: SearchResult) -> str:
    """Draw the loss over rate and batch as colours, of each rung by itself."""
    keys = [FIELDS["rate"], FIELDS["batch"]]
    if not set(keys) <= {dimension.key for dimension in found.space.dimensions}:
        return ""
    optima = {each.rung.name: each.optimum for each in found.extrapolation.climbed} if found.extrapolation else {}
    label, drawn = _label_of(found.objectives[0]), []
    for number, group in enumerate(_groups(found)):
        trials = [
            (float(str(trial.values[keys[0]])), float(str(trial.values[keys[1]])), values[0])
            for trial, values in _finished(found)
            if trial.rung == group and set(keys) <= trial.values.keys()
        ]
        # by rank: in the losses themselves the few bad trials would take all the colours
        ranked = sorted({loss for *_, loss in trials})
        shades = [ranked.index(loss) / max(1, len(ranked) - 1) for *_, loss in trials]
        words = [f"{batch:g}, {label} {loss:.5g}" for _, batch, loss in trials]
        series = [Series([each[:2] for each in trials], shades=shades, words=words)]
        optimum = optima.get(group or "")
        if optimum is not None and len(optimum.at) == 2:
            at = (optimum.at[0].value, optimum.at[1].value)
            series.append(Series([at], "lowest point of the parabola", "red", marker="*"))
        look = Look(keys[0], keys[1], group or "", "xy")
        drawn.append(plot(f"rate-by-batch-{number}", look, series))
    caption = f'<p class="soft">Dots are trials, from violet, the lowest {escape(label)}, to yellow, the highest.</p>'
    return section("Rate x batch", caption, _row(drawn))


def _curves(found: SearchResult) -> str:
    """Draw the held-out losses of the trials while they trained: the best of each rung, or the best ones dark."""
    groups = _groups(found)
    series = []
    for color, group in zip(colors(len(groups)), groups, strict=True):
        ranked = sorted(
            (trial for trial in found.trials if trial.curve and trial.rung == group),
            key=lambda trial: (trial.state != "complete", trial.objectives or (math.inf,), trial.number),
        )[: max(3, _MOST_CURVES // len(groups))]
        shades = colors(len(ranked)) if len(groups) == 1 else [color] * len(ranked)
        for index, (shade, trial) in enumerate(zip(shades, ranked, strict=True)):
            points = [(float(p.tokens), p.held_out_loss) for p in trial.curve if math.isfinite(p.held_out_loss)]
            label = group if group is not None and index == 0 else ""
            line = "-" if trial.state == "complete" else ":"
            series.append(Series(points, label, shade, line, width=1.0, alpha=0.8))
    title = "dark: the best; " if len(groups) == 1 else "the best of each rung; "
    look = Look("tokens", "held-out loss (nats a token)", f"{title}dotted: ended early or diverged")
    return section("Learning curves", plot("curves", look, series))


def _trials(found: SearchResult) -> str:
    keys = [dimension.key for dimension in found.space.dimensions]
    names = ["trial", *(["rung"] if found.ladder is not None else []), *keys, *(o.metric for o in found.objectives)]
    signs = [1.0 if objective.is_better_lower else -1.0 for objective in found.objectives]
    groups = _groups(found)
    ranked = sorted(
        (trial for trial in found.trials if trial.state != "invalid"),
        key=lambda trial: (
            trial.state != "complete",
            groups.index(trial.rung),
            signs[0] * (trial.objectives or (0.0,))[0],
        ),
    )
    rows = []
    for trial in ranked[:_MOST_ROWS]:
        figures = [f"{value:.5g}" for value in trial.objectives or ()] or ["-"] * len(found.objectives)
        cells = [str(trial.number), *([trial.rung or ""] if found.ladder is not None else [])]
        cells += [shown(trial.values[key]) if key in trial.values else "" for key in keys]
        rows.append([*cells, *figures, trial.state + (f": {trial.error}" if trial.error else "")])
    rest = len(ranked) - len(rows)
    more = [f"{counted(rest, 'more trial')} in study.jsonl"] if rest > 0 else []
    rules = Counter(str(trial.error) for trial in found.trials if trial.state == "invalid")
    more += [f"{counted(count, 'combination')} against a rule: {rule}" for rule, count in rules.most_common()]
    return section("Trials", grid([*names, "outcome"], rows), *(f"<p>{escape(each)}</p>" for each in more))
