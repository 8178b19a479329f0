"""One self-contained HTML page about a search: what was tried, what mattered, and what a ladder leads to."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from trimaran.launchers.report.charts import BLUE, ORANGE, PALE_BLUE, RED, Point, bars
from trimaran.launchers.report.html import document, grid, notice, section, table, write_page
from trimaran.launchers.report.tune_charts import NARROW, WIDE, Band, Look, Series, contours, plot
from trimaran.models.fields import counted
from trimaran.runtime.plan.published import Scale
from trimaran.runtime.tune.extrapolate import Climbed, Extrapolation, rows_of
from trimaran.runtime.tune.ladder import FIELDS, Ladder
from trimaran.runtime.tune.propose import importances
from trimaran.runtime.tune.space import Dimension, Space
from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection

PAGE: Final = "tune.html"
_STATES: Final = ("complete", "pruned", "diverged", "failed", "invalid", "running")
_MOST_ROWS: Final = 200
_MOST_CURVES: Final = 60
_CURVE_POINTS: Final = 60
_GREY: Final = "#5b6577"


@dataclass(frozen=True)
class SearchResult:
    """What a page is about.

    Args:
        problem: why a ladder leads to nothing yet, "" where it does.
    """

    name: str
    objectives: Sequence[ObjectiveSection]
    space: Space
    trials: Sequence[Trial]
    ladder: Ladder | None = None
    extrapolation: Extrapolation | None = None
    problem: str = ""


def write_tune_page(found: SearchResult, folder: Path) -> Path:
    """Write tune.html into the folder of a study; return its path."""
    counts = Counter(trial.state for trial in found.trials)
    headline = escape(", ".join(f"{counts[state]:,} {state}" for state in _STATES if counts[state]) or "no trial yet")
    problems = [*found.problem.splitlines(), *(found.extrapolation.untold if found.extrapolation else ())]
    parts = [
        notice("problem", problems),
        _target(found),
        *_laws(found),
        section("Trials by outcome", bars("outcomes", "trials", list(_STATES), [counts[s] for s in _STATES])),
        _history(found),
        _front(found),
        _importance(found),
        _slices(found),
        _contours(found),
        _curves(found),
        _trials(found),
    ]
    return write_page(folder / PAGE, document(found.name, headline, parts))


def _finished(found: SearchResult) -> list[tuple[Trial, tuple[float, ...]]]:
    return [
        (trial, trial.objectives)
        for trial in found.trials
        if trial.state == "complete" and trial.objectives is not None and all(map(math.isfinite, trial.objectives))
    ]


def _groups(found: SearchResult) -> list[str | None]:
    """Return the rungs, which are searched each by itself; None alone without a ladder."""
    return [rung.name for rung in found.ladder.rungs] if found.ladder is not None else [None]


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def _history(found: SearchResult) -> str:
    """Draw each objective over the trials in their order, and the best so far, of each rung by itself."""
    groups = _groups(found)
    shown = []
    for index, objective in enumerate(found.objectives):
        better = min if objective.is_better_lower else max
        series = []
        for color, group in zip([BLUE] if len(groups) == 1 else _colors(len(groups)), groups, strict=True):
            points = [(float(t.number), values[index]) for t, values in _finished(found) if t.rung == group]
            best = [(x, better(y for _, y in points[: place + 1])) for place, (x, _) in enumerate(points)]
            steps = [point for a, b in pairwise(best) for point in (a, (b[0], a[1]))] + best[-1:]
            series += [Series(points, "", color, alpha=0.6), Series(steps, group or "best so far", color, "-")]
        shown.append(plot(f"history-{index}", Look("trial", objective.metric), series))
    return section("History", *shown)


def _front(found: SearchResult) -> str:
    """Draw the trials by two objectives, and those of which no other is better in both."""
    if len(found.objectives) != 2:
        return ""
    signs = [1.0 if objective.is_better_lower else -1.0 for objective in found.objectives]
    points = [(values[0], values[1]) for _, values in _finished(found)]

    def beats(a: Point, b: Point) -> bool:
        return a != b and all(sign * x <= sign * y for sign, x, y in zip(signs, a, b, strict=True))

    front = sorted(point for point in set(points) if not any(beats(other, point) for other in points))
    series = [
        Series(points, "trials", PALE_BLUE),
        Series(front, "Pareto front", ORANGE, "--"),
        Series(front, "", ORANGE),
    ]
    return section("Pareto front", plot("front", Look(found.objectives[0].metric, found.objectives[1].metric), series))


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
    title = f"share of the variance of {found.objectives[0].metric}" + (f", {group}" if group else "")
    return section(heading, bars("importance", title, list(shares), list(shares.values())))


def _slices(found: SearchResult) -> str:
    """Draw the first objective over each dimension."""
    groups = _groups(found)
    colors = [BLUE] if len(groups) == 1 else _colors(len(groups))
    shown = []
    for number, dimension in enumerate(found.space.dimensions):
        place, ticks = _places(dimension)
        series = []
        for color, group in zip(colors, groups, strict=True):
            points = [
                (place(trial.values[dimension.key]), values[0])
                for trial, values in _finished(found)
                if trial.rung == group and dimension.key in trial.values
            ]
            series.append(Series(points, group or "", color, alpha=0.7))
        look = Look(dimension.key, found.objectives[0].metric, "", "x" if _is_log(dimension) else "", NARROW, ticks)
        shown.append(plot(f"slice-{number}", look, series))
    return section("Slices", '<div class="row">' + "".join(f"<div>{each}</div>" for each in shown) + "</div>")


def _is_log(dimension: Dimension) -> bool:
    if dimension.choices is None:
        return dimension.log
    numbers = [each for each in dimension.choices if type(each) in (int, float)]
    return len(numbers) == len(dimension.choices) and min(numbers) > 0 and max(numbers) >= 8 * min(numbers)


def _places(dimension: Dimension) -> tuple[Any, Sequence[str]]:
    """Return what gives the place of a value on an axis, and the names of the places where values are no numbers."""
    if dimension.choices is None or all(type(each) in (int, float) for each in dimension.choices):
        return float, ()
    return dimension.coordinate_of, [str(each) for each in dimension.choices]


def _contours(found: SearchResult) -> str:
    """Draw the loss over rate and batch, of each rung by itself."""
    keys = [FIELDS["rate"], FIELDS["batch"]]
    if not set(keys) <= {dimension.key for dimension in found.space.dimensions}:
        return ""
    optima = {each.rung.name: each.optimum for each in found.extrapolation.climbed} if found.extrapolation else {}
    shown = []
    for number, group in enumerate(_groups(found)):
        points = [
            (float(str(trial.values[keys[0]])), float(str(trial.values[keys[1]])), values[0])
            for trial, values in _finished(found)
            if trial.rung == group and set(keys) <= trial.values.keys()
        ]
        optimum = optima.get(group or "")
        best = (optimum.at[0].value, optimum.at[1].value) if optimum is not None and len(optimum.at) == 2 else None
        look = Look(" x ".join(keys), found.objectives[0].metric, group or "", size=NARROW)
        shown.append(contours(f"contours-{number}", look, points, best))
    body = '<div class="row">' + "".join(f"<div>{each}</div>" for each in shown) + "</div>"
    return section("Rate x batch", body)


def _target(found: SearchResult) -> str:
    if found.extrapolation is None:
        return ""
    return section("The target", table(rows_of(found.extrapolation)))


def _laws(found: SearchResult) -> list[str]:
    """Draw the parabolas of the rungs, the laws over them, and the law of the loss."""
    result, ladder = found.extrapolation, found.ladder
    if result is None or ladder is None:
        return []
    shown = [_parabolas(ladder, result, axis) for axis in range(len(ladder.names))]
    shown += [_optima(ladder, result, axis) for axis in range(len(ladder.names))]
    return [*shown, _loss(ladder, result)]


def _parabolas(ladder: Ladder, result: Extrapolation, axis: int) -> str:
    searched = [each for each in result.climbed if each.optimum is not None]
    series = []
    for color, each in zip(_colors(len(searched)), searched, strict=True):
        assert each.optimum is not None, "it was searched"
        key = FIELDS[ladder.names[axis]]
        points = [
            (float(str(trial.values[key])), trial.objectives[0])
            for trial in each.trials
            if trial.state == "complete" and trial.objectives is not None
        ]
        at, near = each.optimum.at, [point[axis] for point in each.optimum.near]
        values = [other.value for other in at]
        curve = [
            (x, each.optimum.curve(*values[:axis], x, *values[axis + 1 :])) for x in _between(min(near), max(near))
        ]
        lowest = [(at[axis].value, each.optimum.loss.value)]
        ends = [(at[axis].low, at[axis].high)]
        series += [
            Series(points, "", color, alpha=0.5),
            Series(curve, each.rung.name, color, "-"),
            Series(lowest, "", color, marker="*", sideways=ends),
        ]
    look = Look(FIELDS[ladder.names[axis]], "held-out loss", "stars: the lowest point and its 95% interval", "x")
    return section(f"Best {ladder.names[axis]} of each rung", plot(f"parabolas-{axis}", look, series))


def _optima(ladder: Ladder, result: Extrapolation, axis: int) -> str:
    """Draw the best values over the parameters, the law through them with its band, and published laws."""
    name = ladder.names[axis]
    law = result.optima.get(name)
    if law is None:
        return ""
    unit = 1 if name == "rate" else result.target.train.seq_len
    series, band = [], []
    ratio = ladder.target.ratio
    sizes = _between(min(each.run.parameters for each in result.climbed), ladder.target.parameters)
    for size in sizes:
        at = law.predict(size, ratio * size)
        band.append((size, at.low, at.high))
    series.append(Series([(size, law.predict(size, ratio * size).value) for size in sizes], "law", BLUE, "-"))
    held = [each for each in result.climbed if each.rung.parameters == ladder.held_out]
    for label, color, some in (
        ("rungs", BLUE, [each for each in result.climbed if each not in held]),
        ("held-out rung", ORANGE, held),
    ):
        values = [each.optimum.at[axis] for each in some if each.optimum is not None]
        points = [(each.run.parameters, value.value) for each, value in zip(some, values, strict=True)]
        series.append(Series(points, label, color, bounds=[(value.low, value.high) for value in values]))
    target = result.values[name]
    series.append(
        Series(
            [(ladder.target.parameters, target.value)], "target", RED, marker="*", bounds=[(target.low, target.high)]
        )
    )
    dashes = iter((":", "--", "-."))
    for published, at_target in result.published:
        if published.quantity == name:
            points = [(each.run.parameters, published.at(_scale(each)) / unit) for each in result.climbed]
            points.append((ladder.target.parameters, at_target / unit))
            series.append(Series(points, published.name, _GREY, next(dashes)))
    look = Look("parameters", FIELDS[name], "band: where 95% of such optima lie", "xy")
    bands = [Band(band)] if band else []
    return section(f"The law of the {name}", plot(f"law-{name}", look, series, bands))


def _scale(climbed: Climbed) -> Scale:
    rung, tokens = climbed.rung, climbed.run.tokens
    return Scale(rung.parameters, rung.parameters_without_embeddings, tokens, rung.layer_flops_per_token * tokens)


def _loss(ladder: Ladder, result: Extrapolation) -> str:
    """Draw the losses of the rungs over their compute, the law with its band, and the target."""
    law = result.loss
    if law is None:
        return ""
    ratio = ladder.target.ratio
    line, band = [], []
    for size in _between(min(each.run.parameters for each in result.climbed), ladder.target.parameters):
        at = law.predict(size, ratio * size)
        line.append((size, at.value))
        band.append((size, at.low, at.high))
    held = [each for each in result.climbed if each.rung.parameters == ladder.held_out]
    rest = [each for each in result.climbed if each not in held]
    series = [
        Series(line, f"{law.form}, {ratio:g} tokens a parameter", BLUE, "-"),
        Series([(each.run.parameters, each.run.loss) for each in rest], "rungs", BLUE),
        Series([(each.run.parameters, each.run.loss) for each in held], "held-out rung", ORANGE),
    ]
    if result.predicted is not None:
        ends = [(result.predicted.low, result.predicted.high)]
        point = [(float(ladder.target.parameters), result.predicted.value)]
        series.append(Series(point, "target, predicted", RED, marker="*", bounds=ends))
    look = Look("parameters", "held-out loss", "band: where 95% of such runs lie", "x")
    rows = [(each.rung.name, _words(each)) for each in result.climbed]
    return section("The law of the loss", plot("law-loss", look, series, [Band(band)]), table(rows))


def _words(climbed: Climbed) -> str:
    run, flops = climbed.run, climbed.rung.flops_per_token * climbed.run.tokens
    return (
        f"{run.parameters:,.0f} parameters, {run.tokens:,.0f} tokens, {flops:.3g} FLOP each, "
        f"loss {climbed.optimum.loss if climbed.optimum is not None else run.loss}"
    )


def _between(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (step / _CURVE_POINTS) for step in range(_CURVE_POINTS + 1)]


def _curves(found: SearchResult) -> str:
    """Draw the held-out losses of the trials while they trained, the best ones dark."""
    ranked = sorted(
        (trial for trial in found.trials if trial.curve),
        key=lambda trial: (trial.state != "complete", trial.objectives or (math.inf,), trial.number),
    )[:_MOST_CURVES]
    series = []
    for color, trial in zip(_colors(len(ranked)), ranked, strict=True):
        points = [(float(p.tokens), p.held_out_loss) for p in trial.curve if math.isfinite(p.held_out_loss)]
        series.append(Series(points, "", color, "-" if trial.state == "complete" else ":", width=1.0, alpha=0.8))
    title = "dark: the best; dotted: ended early or diverged"
    return section("Learning curves", plot("curves", Look("tokens", "held-out loss", title, size=WIDE), series))


def _trials(found: SearchResult) -> str:
    keys = [dimension.key for dimension in found.space.dimensions]
    names = ["trial", *(["rung"] if found.ladder is not None else []), *keys, *(o.metric for o in found.objectives)]
    rows = []
    signs = [1.0 if objective.is_better_lower else -1.0 for objective in found.objectives]
    ranked = sorted(
        found.trials,
        key=lambda trial: (trial.state != "complete", trial.rung or "", signs[0] * (trial.objectives or (0.0,))[0]),
    )
    for trial in ranked[:_MOST_ROWS]:
        figures = [f"{value:.5g}" for value in trial.objectives or ()] or ["-"] * len(found.objectives)
        cells = [str(trial.number), *([trial.rung or ""] if found.ladder is not None else [])]
        cells += [_shown(trial.values.get(key, "")) for key in keys]
        rows.append([*cells, *figures, trial.state + (f": {trial.error}" if trial.error else "")])
    rest = len(found.trials) - len(rows)
    more = f"<p>{counted(rest, 'more trial')} in study.jsonl.</p>" if rest > 0 else ""
    return section("Trials", grid([*names, "outcome"], rows), more)


def _shown(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
