"""Charts as SVG elements to stand in one HTML page: lines over the steps of a run, and bars."""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]

BLUE, PALE_BLUE, ORANGE, RED = "#1d4ed8", "#93b4f5", "#ea580c", "#dc2626"
COLORS = (BLUE, ORANGE, RED, "#15803d", "#7c3aed", "#0f766e", PALE_BLUE, "#a16207")

_MOST_POINTS = 1500  # a chart is about 900 pixels wide; more points only make the file bigger


@dataclass(frozen=True)
class Line:
    """One line of a chart: (step, value) points in order of the step; `dots` marks each of them.

    `errors`: of each point the half height of its bar, or none.
    """

    points: Sequence[Point]
    label: str
    color: str
    width: float = 1.1
    dots: bool = False
    errors: Sequence[float] = ()


def chart(
    name: str,
    label: str,
    lines: Sequence[Line],
    size: tuple[float, float],
    from_zero: bool = False,
    lost: Sequence[float] = (),
    x_label: str = "step",
) -> str:
    """Return a line chart over the steps, or over what `x_label` says, as an ``<svg>`` element.

    Args:
        name: unique on the page; ids in the SVG start with it.
        size: width and height in inches of 72 points.
        lost: steps whose value is not finite, marked on the lower edge.
    """
    if not any(line.points for line in lines):
        return "<p>Not recorded, or never a finite number.</p>"
    # a Figure of its own: pyplot would keep global state and choose a backend for the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        if line.points:
            xs, ys = zip(*thin(line.points), strict=True)
            marker = "o" if line.dots or len(xs) == 1 else ""
            axes.plot(xs, ys, color=line.color, linewidth=line.width, marker=marker, markersize=4, label=line.label)
            if len(line.errors) == len(xs):
                axes.errorbar(xs, ys, yerr=line.errors, color=line.color, fmt="none", capsize=2)
    if lost:
        marks = [x for x, _ in thin([(x, 0.0) for x in lost])]
        edge = axes.get_xaxis_transform()
        axes.plot(
            marks,
            [0.02] * len(marks),
            transform=edge,
            color=RED,
            marker="x",
            linestyle="",
            markersize=5,
            label="not a number",
        )
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))  # learning rates read better as 3.0 with 1e-4 above the axis
    axes.set_xlabel(x_label)
    axes.set_ylabel(label)
    axes.grid(color="#e3e7ee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)
    return svg_of(figure, name)


def bars(name: str, label: str, labels: Sequence[str], values: Sequence[float]) -> str:
    """Return horizontal bars, one below the other, as an ``<svg>`` element.

    Args:
        name: unique on the page; ids in the SVG start with it.
        labels: of each bar.
    """
    if not any(values):
        return f"<p>{label}: none.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.7 + 0.24 * len(values)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(values)), values, color=PALE_BLUE)
    axes.bar_label(drawn, [f"{value:,.0f}" if value >= 10 else f"{value:,.3g}" for value in values], padding=4)
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(label, loc="left", fontsize="medium")
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return svg_of(figure, name)


def intervals(name: str, label: str, rows: Sequence[tuple[str, float, float | None]]) -> str:
    """Return points with their intervals, one below the other, as an ``<svg>`` element.

    Args:
        name: unique on the page; ids in the SVG start with it.
        rows: label, value, and half the width of the interval (None: unknown) of each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, (_, value, half) in enumerate(rows):
        axes.errorbar([value], [number], xerr=None if half is None else [half], color=BLUE, fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), [text for text, _, _ in rows])
    axes.invert_yaxis()
    axes.set_title(label, loc="left", fontsize="medium")
    axes.grid(axis="x", color="#e3e7ee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return svg_of(figure, name)


def svg_of(figure: "Figure", name: str) -> str:
    """Return a figure as an ``<svg>`` element; ids in it start with `name`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Ids come from a random number otherwise, and metadata would add a date and addresses of vocabularies.
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return embed(buffer.getvalue(), name)


def embed(svg: str, name: str) -> str:
    """Return an SVG document as an element of an HTML page.

    The XML head goes (HTML has its own), and ids and the style rule are kept from reaching other pictures of the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # matplotlib's one rule is for every element of the page; both of its properties are inherited, so the root can
    # carry them
    found = re.search(r"<style[^>]*>\*\{([^}]*)\}</style>", svg)
    if found:
        svg = svg.replace(found.group(0), "", 1).replace("<svg", f'<svg style="{found.group(1).strip()}"', 1)
    return svg


def plain(text: str) -> str:
    """Return a text in which matplotlib sees no mathematics."""
    return text.replace("$", r"\$")


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the centred moving average over about a fiftieth of the run.

    Centred, because an average of the past alone lags behind a falling loss and reads as if training were slower. The
    window shrinks towards both ends and stays symmetric there.
    """
    reach = max(5, len(points) // 100)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    found = []
    for index, (x, _) in enumerate(points):
        side = min(reach, index, len(points) - 1 - index)
        found.append((x, (sums[index + side + 1] - sums[index - side]) / (2 * side + 1)))
    return found


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most 1500 points: the lowest and the highest of every stretch, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept
