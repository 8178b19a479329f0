"""Pictures of plans, searches and published runs, each an SVG file of its own."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from trimaran.launchers.report.charts import BLUE, COLORS, ORANGE, PALE_BLUE, RED
from trimaran.runtime.pipeline.action import KINDS
from trimaran.runtime.pipeline.simulate import Span
from trimaran.runtime.plan.forecast import Plan, Setting
from trimaran.runtime.plan.search.search import Search
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB: Final = 2.0**30
_MOST_NODES: Final = 48  # of the map; more rows are too thin to read
_MOST_GRIDS: Final = 24  # of a search
_MOST_BARS: Final = 64
_GRID_COLOR: Final = "#e3e7ee"


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

    nodes = min(_MOST_NODES, -(-spec.world_size // setting.gpus_per_node))
    heights = (1.2 + 0.3 * min(spec.parallel.pp, _MOST_BARS), 1.0 + 0.3 * spec.parallel.pp, 1.2 + 0.16 * nodes)
    figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
    memory, steps, ranks = figure.subplots(3, 1, height_ratios=heights)
    _memory_bars(memory, setting, found)
    _timeline(steps, spec, spans)
    _map(ranks, spec, setting, nodes)
    return standalone(figure)


def _memory_bars(axes: "Axes", setting: Setting, found: Plan) -> None:
    """Bars by part, one for each pipeline rank, with the chip's line."""
    names = [name for name in found.memory[0] if any(rank[name] for rank in found.memory)]
    shown = found.memory[:_MOST_BARS]
    left = [0.0] * len(shown)
    for name, color in zip(names, (*COLORS, "#5b6577", "#b45309"), strict=False):
        sizes = [rank[name] / _GIB for rank in shown]
        axes.barh(range(len(shown)), sizes, left=left, color=color, label=name, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    axes.axvline(setting.chip.memory_bytes / _GIB, color=RED, linestyle="--", label=setting.chip.name)
    axes.set_yticks(range(len(shown)), [f"{rank}" for rank in range(len(shown))])
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("GiB")
    axes.invert_yaxis()
    axes.set_title("what each pipeline rank holds at most", loc="left", fontsize="medium")
    _plain(axes, "x")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _timeline(axes: "Axes", spec: RunSpec, spans: Sequence[Span]) -> None:
    """Boxes of each rank's actions; chunks of a rank from dark to light."""
    stages: dict[int, list[int]] = {}
    for stage in sorted({span.action.stage for span in spans}):
        owner = next(span.rank for span in spans if span.action.stage == stage)
        stages.setdefault(owner, []).append(stage)
    labelled = set()
    for span in spans:
        kind = KINDS[span.action.kind]
        if not span.action.is_compute:
            continue
        chunk = stages[span.rank].index(span.action.stage)
        color = kind.shades[min(chunk, len(kind.shades) - 1)]
        label = kind.words if kind.words not in labelled else None
        labelled.add(kind.words)
        axes.broken_barh(
            [(span.start, span.stop - span.start)], (span.rank - 0.4, 0.8), color=color, edgecolor="white",
            linewidth=0.4, label=label,
        )  # fmt: skip
    axes.set_yticks(range(spec.parallel.pp))
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("milliseconds")
    axes.invert_yaxis()
    drawn = len({span.action.microbatch for span in spans})
    title = f"the step: {drawn} of {spec.num_microbatches} microbatches, {spec.parallel.schedule}"
    axes.set_title(title, loc="left", fontsize="medium")
    _plain(axes, "")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _map(axes: "Axes", spec: RunSpec, setting: Setting, nodes: int) -> None:
    """A row a node and a cell a GPU, coloured by pipeline rank, with the rank's tp and dp; then what crosses nodes."""
    parallel, width = spec.parallel, setting.gpus_per_node
    for rank in range(min(spec.world_size, nodes * width)):
        tp, rest = rank % parallel.tp, rank // parallel.tp
        dp, pp = rest % parallel.dp, rest // parallel.dp
        x, y = rank % width, rank // width
        axes.broken_barh([(x, 0.94)], (y - 0.46, 0.92), color=COLORS[pp % len(COLORS)], alpha=0.75)
        axes.text(x + 0.47, y, f"tp {tp} · pp {pp} · dp {dp}", ha="center", va="center", fontsize=5.5, color="white")
    axes.set_xlim(0, width)
    axes.set_ylim(nodes - 0.5, -0.5)
    axes.set_yticks(range(nodes), [f"node {node}" for node in range(nodes)], fontsize=6)
    axes.xaxis.set_visible(False)
    more = -(-spec.world_size // width) - nodes
    shown = f"; {more} further nodes are not drawn" if more > 0 else ""
    axes.set_title(f"where ranks live: {crossings(spec, width)}{shown}", loc="left", fontsize="medium")
    axes.spines[:].set_visible(False)


def crossings(spec: RunSpec, gpus_per_node: int) -> str:
    """Return which axes stay inside a node, and which cross the network's cards."""
    parallel = spec.parallel
    reach = {"tp": parallel.tp, "dp": parallel.tp * parallel.dp, "pp": parallel.tp * parallel.dp * parallel.pp}
    sizes = {"tp": parallel.tp, "dp": parallel.dp, "pp": parallel.pp}
    used = [axis for axis in reach if sizes[axis] > 1]
    inside = [axis for axis in used if reach[axis] <= gpus_per_node]
    across = [axis for axis in used if reach[axis] > gpus_per_node]
    words = [f"{', '.join(inside)} inside a node"] if inside else []
    words += [f"{', '.join(across)} between nodes"] if across else []
    return "; ".join(words) or "one GPU"


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
    _plain(axes, "x")
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
        _plain(axes, "both")
        axes.legend(frameon=False, fontsize="x-small")
    return standalone(figure)


def _plain(axes: "Axes", grid: str) -> None:
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="both" if grid == "both" else "x", color=_GRID_COLOR, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
