"""Charts of a search as SVG elements: marks, lines and bands over one value, and contours over two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimaran.launchers.report.charts import BLUE, Point, svg_of
from trimaran.runtime.tune.tune_spec import ObjectiveSection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[float, float]

WIDE: Size = (10.4, 3.7)
GREY = "#5b6577"
_MOST_INSIDE = 6  # names in a legend, above which it stands beside the chart
_LABELS = {
    "held_out_loss": "held-out loss (nats a token)",
    "bits_per_byte": "bits a byte",
    "tokens_per_second": "tokens a second",
}
NARROW: Size = (5.0, 3.4)


@dataclass(frozen=True)
class Series:
    """Points of a chart.

    Args:
        label: in the legend, "" for none.
        line: "-", ":" or "--" joins the points; "" marks each of them.
        bounds: of each point the ends of its interval, upright.
        sideways: of each point the ends of its interval, lying.
    """

    points: Sequence[Point]
    label: str = ""
    color: Any = BLUE
    line: str = ""
    marker: str = "o"
    bounds: Sequence[Point] = ()
    sideways: Sequence[Point] = ()
    width: float = 1.5
    alpha: float = 1.0


@dataclass(frozen=True)
class Band:
    """An area between two curves: of each x its low and high."""

    bounds: Sequence[tuple[float, float, float]]
    label: str = ""
    color: str = BLUE


@dataclass(frozen=True)
class Look:
    """How a chart looks.

    Args:
        log: which axes are logarithmic: "", "x", "y" or "xy".
        ticks: names of places on the x axis, for listed values.
        span: the places that the x axis reaches in any case.
        counts: which axes have counts, with k, M and G for thousands, millions and billions.
    """

    x: str
    y: str
    title: str = ""
    log: str = ""
    size: Size = WIDE
    ticks: Mapping[float, str] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    counts: str = ""


def label_of(objective: ObjectiveSection) -> str:
    """Return an objective as the name of an axis, with its unit."""
    return _LABELS.get(objective.metric, objective.metric)


def colors(count: int) -> list[Any]:
    """Return so many colours from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def plot(name: str, look: Look, series: Sequence[Series], bands: Sequence[Band] = ()) -> str:
    """Return a chart as an ``<svg>`` element; `name` is unique on the page."""
    if not any(each.points for each in series):
        return f"<p>{look.title or look.y}: nothing to draw yet.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=look.size, layout="constrained")
    axes = figure.subplots()
    for band in bands:
        xs, lows, highs = zip(*band.bounds, strict=True)
        axes.fill_between(xs, lows, highs, color=band.color, alpha=0.15, linewidth=0, label=band.label or None)
    for each in series:
        _draw(axes, each)
    _dress(axes, look)
    names = len(axes.get_legend_handles_labels()[1])
    if names > _MOST_INSIDE:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    elif names:
        axes.legend(frameon=False, fontsize="small")
    return svg_of(figure, name)


def _draw(axes: "Axes", series: Series) -> None:
    if not series.points:
        return
    xs, ys = zip(*series.points, strict=True)
    axes.plot(
        xs,
        ys,
        color=series.color,
        linestyle=series.line,
        linewidth=series.width,
        marker="" if series.line and len(xs) > 1 else series.marker,
        markersize=5,
        alpha=series.alpha,
        label=series.label or None,
    )
    for ends, values, side in ((series.bounds, ys, "yerr"), (series.sideways, xs, "xerr")):
        if ends:
            below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
            errors: dict[str, Any] = {side: [below, above]}
            axes.errorbar(xs, ys, color=series.color, linestyle="", capsize=3, linewidth=1.2, **errors)


def _dress(axes: "Axes", look: Look) -> None:
    from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, NullFormatter, NullLocator

    for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if letter not in look.log:
            continue
        (axes.set_xscale if letter == "x" else axes.set_yscale)("log")
        low, high = axes.get_xlim() if letter == "x" else axes.get_ylim()
        if high < 100 * low:  # powers of ten alone would be too few
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
        axis.set_minor_formatter(NullFormatter())
    for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if letter in look.counts:
            axis.set_major_formatter(EngFormatter(sep=""))
    if look.span is not None:
        axes.plot(look.span, [axes.get_ylim()[0]] * 2, alpha=0.0)
    if look.ticks:
        axes.xaxis.set_minor_locator(NullLocator())
        names = list(look.ticks.values())
        axes.set_xticks(list(look.ticks), names, rotation=20 if len(", ".join(names)) > 40 else 0)
    axes.set_xlabel(look.x)
    axes.set_ylabel(look.y)
    axes.set_title(look.title, loc="left", fontsize="medium")
    axes.grid(color="#e3e7ee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def contours(name: str, look: Look, points: Sequence[tuple[float, float, float]], best: Point | None) -> str:
    """Return contours of a value over two logarithmic axes, as an ``<svg>`` element; the trials are dots.

    Args:
        best: where the lowest point is marked.
    """
    xs, ys, values = ([each[axis] for each in points] for axis in range(3))
    if len(points) < 4 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return f"<p>{look.title}: too few trials for contours.</p>"
    from matplotlib.figure import Figure
    from matplotlib.tri import Triangulation

    figure = Figure(figsize=look.size, layout="constrained")
    axes = figure.subplots()
    low, high = min(values), max(values)
    # close to the best the levels lie closer, where the differences that matter are
    levels = [low + (high - low) * (step / 12) ** 2 for step in range(13)] if high > low else [low, low + 1e-6]
    # triangles are made in logarithms: in the values themselves they would be slivers
    triangles = Triangulation([math.log(x) for x in xs], [math.log(y) for y in ys]).triangles
    filled = axes.tricontourf(Triangulation(xs, ys, triangles), values, levels=levels, cmap="viridis_r")
    figure.colorbar(filled, ax=axes, label=look.y, format="%.3g")
    axes.plot(xs, ys, "o", color="#ffffff", markeredgecolor="#1b2333", markersize=4)
    if best is not None:
        axes.plot(*best, "*", color="#dc2626", markersize=14)
    first, _, second = look.x.partition(" x ")
    _dress(axes, Look(first, second, look.title, "xy"))
    return svg_of(figure, name)
