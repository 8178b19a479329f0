"""Pictures of plans, searches and published runs, each an SVG file of its own."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from trimaran.launchers.report.charts import (
    BLUE,
    COLORS,
    ORANGE,
    PALE_BLUE,
    Grid,
    bars_height,
    memory_bars,
    plain_axes,
    rank_map,
)
from trimaran.runtime.pipeline.draw import draw_timeline, timeline_height
from trimaran.runtime.pipeline.simulate import Span
from trimaran.runtime.plan.forecast import Plan, Setting
from trimaran.runtime.plan.search.search import Search
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    heights = (bars_height(spec.parallel.pp), timeline_height(spec.parallel.pp) / 100, grid.height)
    figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
    memory, steps, ranks = figure.subplots(3, 1, height_ratios=heights)
    memory_bars(memory, found.memory, setting.chip.memory_bytes, setting.chip.name)
    drawn = len({span.action.microbatch for span in spans})
    title = f"the step: {drawn} of {spec.num_microbatches} microbatches, {spec.parallel.schedule}"
    draw_timeline(steps, spans, title)
    rank_map(ranks, grid)
    return standalone(figure)


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
