"""Charts as SVG elements to stand in one HTML page: lines over steps, bars, what ranks hold and where they live."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

BLUE, PALE_BLUE, ORANGE, RED = "#1d4ed8", "#93b4f5", "#ea580c", "#dc2626"
COLORS = (BLUE, ORANGE, RED, "#15803d", "#7c3aed", "#0f766e", PALE_BLUE, "#a16207")

GIB: Final = 2.0**30
MOST_BARS: Final = 64
_MOST_NODES: Final = 48  # of the map of ranks; more rows are too thin to read
_MOST_RANKS: Final = 1 << 20
_GRID_COLOR: Final = "#e3e7ee"
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


@dataclass(frozen=True)
class Grid:
    """Where ranks live: `width` consecutive ones share a node; tp is innermost, then cp, dp, pp."""

    tp: int
    cp: int
    dp: int
    pp: int
    width: int

    @classmethod
    def of(cls, parallel: Mapping[str, Any], width: int) -> "Grid | None":
        """Return the grid of a spec's section, which anyone may have written; None where it is none."""
        sizes = {axis: parallel.get(axis, 1) for axis in ("tp", "cp", "dp", "pp")}
        if not all(isinstance(size, int) and 0 < size <= _MOST_RANKS for size in sizes.values()) or width < 1:
            return None
        grid = cls(**sizes, width=width)
        return grid if grid.ranks <= _MOST_RANKS else None

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def nodes(self) -> int:
        """How many are drawn."""
        return min(_MOST_NODES, -(-self.ranks // self.width))

    @property
    def height(self) -> float:
        """Inches."""
        return 0.8 + 0.16 * self.nodes

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's place along each axis that is longer than 1."""
        found, rest = {}, rank
        for axis in ("tp", "cp", "dp", "pp"):
            size = getattr(self, axis)
            found[axis], rest = rest % size, rest // size
        return {axis: found[axis] for axis in ("tp", "cp", "pp", "dp") if getattr(self, axis) > 1}

    @property
    def crossings(self) -> str:
        """Which axes stay inside a node, and which cross the network's cards."""
        inside: list[str] = []
        across: list[str] = []
        reach = 1
        for axis in ("tp", "cp", "dp", "pp"):
            size = getattr(self, axis)
            reach *= size
            if size > 1:
                (inside if reach <= self.width else across).append(axis)
        words = [f"{', '.join(inside)} inside a node"] if inside else []
        words += [f"{', '.join(across)} between nodes"] if across else []
        return "; ".join(words) or "one rank"


def memory_chart(
    name: str,
    memory: Sequence[Mapping[str, float]],
    limit: float | None,
    place: str,
    peaks: Sequence[float | None],
) -> str:
    """Return `memory_bars` as an ``<svg>`` element.

    Args:
        name: unique on the page; ids in the SVG start with it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, bars_height(len(memory))), layout="constrained")
    memory_bars(figure.subplots(), memory, limit, place, peaks)
    return svg_of(figure, name)


def map_chart(name: str, grid: Grid) -> str:
    """Return where the ranks live as an ``<svg>`` element.

    Args:
        name: unique on the page; ids in the SVG start with it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, grid.height), layout="constrained")
    rank_map(figure.subplots(), grid)
    return svg_of(figure, name)


def bars_height(ranks: int) -> float:
    """Return the inches of `memory_bars` of so many pipeline ranks."""
    return 1.2 + 0.3 * min(ranks, MOST_BARS)


def memory_bars(
    axes: "Axes",
    memory: Sequence[Mapping[str, float]],
    limit: float | None,
    place: str,
    peaks: Sequence[float | None] = (),
) -> None:
    """Draw bars by part, one for each pipeline rank, with the chip's line, and marks of what was measured.

    Args:
        memory: by pipeline rank, bytes by part.
        limit: bytes of the place that is named; None where it is not known.
        peaks: bytes that each pipeline rank's tensors took at most, None or missing where that is not known.
    """
    shown = memory[:MOST_BARS]
    names = [name for name in memory[0] if any(rank.get(name) for rank in memory)]
    unit, scale = ("GiB", GIB) if max(sum(rank.values()) for rank in shown) >= GIB else ("MiB", GIB / 1024)
    left = [0.0] * len(shown)
    for name, color in zip(names, (*COLORS, "#5b6577", "#b45309"), strict=False):
        sizes = [rank.get(name, 0.0) / scale for rank in shown]
        axes.barh(range(len(shown)), sizes, left=left, color=color, label=name, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    marks = [(peak / scale, rank) for rank, peak in enumerate(peaks[: len(shown)]) if peak is not None]
    if marks:
        xs, ys = zip(*marks, strict=True)
        axes.plot(xs, ys, linestyle="", marker="D", color="#111827", markersize=4, label="measured")
    if limit is not None and limit / scale <= 50 * max(left):  # else the bars would be too short to see
        axes.axvline(limit / scale, color=RED, linestyle="--", label=plain(place))
    axes.set_yticks(range(len(shown)), [f"{rank}" for rank in range(len(shown))])
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    axes.set_title("what each pipeline rank holds at most", loc="left", fontsize="medium")
    plain_axes(axes, "x")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def rank_map(axes: "Axes", grid: Grid) -> None:
    """Draw a row a node and a cell a rank, coloured by pipeline rank, with its coordinates; then what crosses nodes."""
    for rank in range(min(grid.ranks, grid.nodes * grid.width)):
        where = grid.coordinates(rank)
        x, y = rank % grid.width, rank // grid.width
        axes.broken_barh([(x, 0.94)], (y - 0.46, 0.92), color=COLORS[where.get("pp", 0) % len(COLORS)], alpha=0.75)
        text = " · ".join(f"{axis} {index}" for axis, index in where.items()) or "rank 0"
        axes.text(x + 0.47, y, text, ha="center", va="center", fontsize=5.5, color="white")
    axes.set_xlim(0, grid.width)
    axes.set_ylim(grid.nodes - 0.5, -0.5)
    axes.set_yticks(range(grid.nodes), [f"node {node}" for node in range(grid.nodes)], fontsize=6)
    axes.xaxis.set_visible(False)
    more = -(-grid.ranks // grid.width) - grid.nodes
    shown = f"; {more} further nodes are not drawn" if more > 0 else ""
    axes.set_title(f"where ranks live: {grid.crossings}{shown}", loc="left", fontsize="medium")
    axes.spines[:].set_visible(False)


def plain_axes(axes: "Axes", grid: str) -> None:
    """Leave away frames that carry nothing; draw a grid under the lines along "x" or "both"."""
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="both" if grid == "both" else "x", color=_GRID_COLOR, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


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
