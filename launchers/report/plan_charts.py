"""Pictures of plans, searches and published runs, each an SVG file of its own."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from trimaran.launchers.report.ranks import MOST_BARS, Grid
from trimaran.models.fields import counted
from trimaran.runtime.pipeline.draw import draw_timeline, timeline_height
from trimaran.runtime.pipeline.simulate import Span
from trimaran.runtime.plan.forecast import Plan, Setting
from trimaran.runtime.plan.search.search import Search
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE_BLUE, ORANGE, RED = "#1d4ed8", "#93b4f5", "#ea580c", "#dc2626"
COLORS: Final = (BLUE, ORANGE, RED, "#15803d", "#7c3aed", "#0f766e", PALE_BLUE, "#a16207")
_GIB: Final = 2.0**30
_GRID_COLOR: Final = "#e3e7ee"
_MOST_GRIDS: Final = 24  # of a search


def standalone(figure: "Figure") -> str:
    """Return a figure as an SVG document, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "trimaran"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def plan_picture(spec: RunSpec, setting: Setting, found: Plan, spans: Sequence[Span]) -> str:
    """Return memory of every pipeline rank, the timeline of a step, and where the ranks live."""
    from matplotlib.figure import Figure

    grid = Grid.of(spec.parallel.model_dump(), setting.gpus_per_node)
    assert grid is not None, "a spec's layout is one"
    heights = (_bars_height(spec.parallel.pp), timeline_height(spec.parallel.pp) / 100, 0.8 + 0.16 * grid.nodes)
    figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
    memory, steps, ranks = figure.subplots(3, 1, height_ratios=heights)
    _memory_bars(memory, found.memory, setting.chip.memory_bytes, setting.chip.name)
    drawn = len({span.action.microbatch for span in spans})
    title = f"the step: {drawn} of {spec.num_microbatches} microbatches, {spec.parallel.schedule}"
    draw_timeline(steps, spans, title)
    _rank_map(ranks, grid)
    return standalone(figure)


def _bars_height(ranks: int) -> float:
    """Return the inches of the bars of so many pipeline ranks."""
    return 1.2 + 0.3 * min(ranks, MOST_BARS)


def _memory_bars(
    axes: "Axes",
    memory: Sequence[Mapping[str, float]],
    limit: float | None,
    place: str,
) -> None:
    """Draw bars by part, one for each pipeline rank, with the chip's line.

    Args:
        memory: by pipeline rank, bytes by part.
        limit: bytes of the place that is named; None where it is not known.
    """
    shown = memory[:MOST_BARS]
    names = [name for name in memory[0] if any(rank.get(name) for rank in memory)]
    unit, scale = ("GiB", _GIB) if max(sum(rank.values()) for rank in shown) >= _GIB else ("MiB", _GIB / 1024)
    left = [0.0] * len(shown)
    for name, color in zip(names, (*COLORS, "#5b6577", "#b45309"), strict=False):
        sizes = [rank.get(name, 0.0) / scale for rank in shown]
        axes.barh(range(len(shown)), sizes, left=left, color=color, label=name, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    if limit is not None and limit / scale <= 50 * max(left):  # else the bars would be too short to see
        axes.axvline(limit / scale, color=RED, linestyle="--", label=place.replace("$", r"\$"))
    axes.set_yticks(range(len(shown)), [f"{rank}" for rank in range(len(shown))])
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    axes.set_title("what each pipeline rank holds at most", loc="left", fontsize="medium")
    plain_axes(axes, "x")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _rank_map(axes: "Axes", grid: Grid) -> None:
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
    shown = f"; {counted(more, 'further node')} not drawn" if more > 0 else ""
    axes.set_title(f"where ranks live: {grid.crossings}{shown}", loc="left", fontsize="medium")
    axes.spines[:].set_visible(False)


def plain_axes(axes: "Axes", grid: str) -> None:
    """Leave away frames that carry nothing; draw a grid under the lines along "x" or "both"."""
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="both" if grid == "both" else "x", color=_GRID_COLOR, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def search_picture(found: Search, setting: Setting) -> str:
    """Return the time of every layout that fits, by its tp x pp x dp, the fastest grid first."""
    from matplotlib.figure import Figure

    grids: dict[str, list[float]] = {}
    for layout, seconds in found.timed:
        grids.setdefault(f"{layout.tp} x {layout.pp} x {layout.dp}", []).append(seconds)
    shown = list(grids.items())[:_MOST_GRIDS]
    figure = Figure(figsize=(10.0, 1.4 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for row, (_, times) in enumerate(shown):
        axes.plot(times, [row] * len(times), linestyle="", marker="|", color=PALE_BLUE, markersize=9)
        axes.plot([times[0]], [row], linestyle="", marker="o", color=BLUE, markersize=5)
    best = found.found[0]
    axes.axvline(best.plan.seconds, color=ORANGE, linestyle="--", label=f"planned: {best.layout}")
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylabel("tp x pp x dp")
    axes.set_xlabel("estimated seconds of a step")
    axes.invert_yaxis()
    title = f"{found.fitting:,} layouts that fit {setting.chip.name}; the dot is a grid's fastest"
    axes.set_title(title, loc="left", fontsize="medium")
    plain_axes(axes, "x")
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return standalone(figure)


def published_picture(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """Return predicted against measured, with lines at 20% off.

    Args:
        panels: by unit, such as "seconds of a step": by software, pairs of what was measured and what was predicted.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(panels), 5.6), layout="constrained")
    for axes, (unit, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        every = [value for pairs in groups.values() for pair in pairs for value in pair]
        low, high = min(every) / 1.3, max(every) * 1.3
        for factor, style in ((1.0, "-"), (1.2, ":"), (1 / 1.2, ":")):
            axes.plot([low, high], [low * factor, high * factor], color="#5b6577", linestyle=style, linewidth=0.8)
        for number, (software, pairs) in enumerate(groups.items()):
            xs, ys = zip(*pairs, strict=True)
            color, marker = COLORS[number % len(COLORS)], "os^D"[number // len(COLORS) % 4]
            axes.plot(xs, ys, linestyle="", marker=marker, color=color, markersize=3, alpha=0.6, label=software)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"measured: {unit}")
        axes.set_ylabel(f"predicted: {unit}")
        plain_axes(axes, "both")
        axes.legend(frameon=False, fontsize="x-small")
    return standalone(figure)
