"""Timelines as pictures: the actions of every rank over time, from simulated or measured spans.

Each kind of action has its colour (`KINDS`), the chunks of a rank (its virtual stages) go from dark to light, and the
pale background is idle time. A thin line under a row is a transfer on the wire, or a wait for one.

What is drawn is a list of boxes and texts in px (`_shapes`), written as SVG for pages or given to matplotlib's axes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.runtime.pipeline.action import KINDS, ActionKind
from trimaran.runtime.pipeline.simulate import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRANSFER_COLOR = KINDS[ActionKind.SEND_F].shades[0]
_INK, _MUTED, _TRACK, _GRID = "#1f2937", "#6b7280", "#f1f5f9", "#cbd5e1"
_DARK_TEXT = "#0f172a"
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 76.0, 64.0, 46.0  # margins of the plot, px
_POINT = 0.72  # points of a px, of which 100 are an inch
_DIGIT_WIDTH = 6.6  # px of one digit of the microbatch numbers (11 px) with its margin


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot's dimensions: times in ms, the rest in px."""

    start: float
    stop: float
    width: float
    row_height: float
    num_ranks: int

    def x(self, time_ms: float) -> float:
        length = self.stop - self.start
        return _LEFT + (time_ms - self.start) / length * self.plot_width if length > 0 else _LEFT

    def y(self, rank: int) -> float:
        return _TOP + rank * self.row_height

    @property
    def plot_width(self) -> float:
        return self.width - _LEFT - _RIGHT

    @property
    def bar_height(self) -> float:
        return self.row_height - 8.0

    @property
    def height(self) -> float:
        return timeline_height(self.num_ranks, self.row_height)


@dataclass(frozen=True, slots=True)
class _Text:
    """`x` is where the text begins, has its middle or ends, by `anchor`; `y` is its base line."""

    x: float
    y: float
    text: str
    size: int = 12
    color: str = _INK
    anchor: str = "start"
    weight: int = 400

    def svg(self) -> str:
        return (
            f'<text x="{self.x:.1f}" y="{self.y:.1f}" font-size="{self.size}" font-weight="{self.weight}" '
            f'fill="{self.color}" text-anchor="{self.anchor}">{escape(self.text)}</text>'
        )

    def draw(self, axes: "Axes") -> None:
        where = {"start": "left", "middle": "center", "end": "right"}[self.anchor]
        weight = "bold" if self.weight > 400 else "normal"
        axes.text(
            self.x, self.y, self.text, size=self.size * _POINT, color=self.color, ha=where, va="baseline",
            weight=weight, parse_math=False,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    color: str
    radius: float = 0.0
    stroke: str = ""
    tooltip: str = ""
    label: _Text | None = None

    def svg(self) -> str:
        stroke = f' stroke="{self.stroke}"' * bool(self.stroke)
        box = (
            f'<rect x="{self.x:.2f}" y="{self.y:.1f}" width="{self.width:.2f}" height="{self.height:.1f}" '
            f'rx="{self.radius:g}" fill="{self.color}"{stroke}/>'
        )
        label = "" if self.label is None else self.label.svg()
        return f"<g><title>{self.tooltip}</title>{box}{label}</g>" if self.tooltip else box

    def draw(self, axes: "Axes") -> None:
        edge = {"edgecolor": self.stroke, "linewidth": 0.5} if self.stroke else {"linewidth": 0.0}
        axes.broken_barh([(self.x, self.width)], (self.y, self.height), facecolor=self.color, **edge)
        if self.label is not None:
            self.label.draw(axes)


def timeline_svg(spans: Sequence[Span], title: str, *, width: float = 1100.0, row_height: float = 34.0) -> str:
    """A self-contained SVG picture of `spans`: one row per rank, a time axis in ms, a tooltip on every box.

    The column at the right is each rank's idle share of the time shown; the title line has their average, the bubble.

    Args:
        spans: of any ranks; times in milliseconds, from any origin. No spans give an empty picture that says so.
        title: plain text above the picture.
        width: picture width in px; it scales with its container.
        row_height: height of one rank's row in px.
    """
    frame = _frame(spans, width, row_height)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'width="{frame.width:g}" height="{frame.height:g}" style="max-width:100%;height:auto" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">'
    )
    paper = f'<rect width="{frame.width:g}" height="{frame.height:g}" fill="#ffffff"/>'
    shapes = [shape.svg() for shape in _shapes(spans, title, frame)]
    return "\n".join([opening, f"<title>{escape(title)}</title>", paper, *shapes, "</svg>"])


def save_png(
    spans: Sequence[Span], path: str | Path, title: str = "", *, width: float = 1100.0, row_height: float = 34.0
) -> None:
    """Write the same picture to `path` as a PNG of 2 x `width` pixels.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
    from matplotlib.figure import Figure

    height = _frame(spans, width, row_height).height
    figure = Figure(figsize=(width / 100, height / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    draw_timeline(figure.add_axes((0, 0, 1, 1)), spans, title, width=width, row_height=row_height)
    figure.savefig(path, format="png")


def draw_timeline(
    axes: "Axes", spans: Sequence[Span], title: str, *, width: float = 1100.0, row_height: float = 34.0
) -> None:
    """Draw the same picture into axes of matplotlib, whose own ticks and frame go; 100 px are an inch."""
    frame = _frame(spans, width, row_height)
    axes.set_xlim(0, frame.width)
    axes.set_ylim(frame.height, 0)
    axes.set_axis_off()
    for shape in _shapes(spans, title, frame):
        shape.draw(axes)


def timeline_height(num_ranks: int, row_height: float = 34.0) -> float:
    """Return the height of a picture in px."""
    return _TOP + num_ranks * row_height + _BOTTOM


def _shapes(spans: Sequence[Span], title: str, frame: _Frame) -> Iterator[_Box | _Text]:
    """Yield what is drawn, the lowest first."""
    idle, chunks = _idle_shares(spans, frame), _chunk_numbers(spans)
    yield _Text(_LEFT, 26, title, size=16, weight=600)
    yield from _legend(spans, max(chunks.values(), default=0) + 1)
    yield from _rows(frame, idle)
    yield from _axis(frame)
    if spans:
        yield _Text(frame.width - _RIGHT, 26, _summary(frame, idle), color=_MUTED, anchor="end")
    else:
        yield _Text(_LEFT + 8, _TOP + frame.row_height / 2 + 4, "no spans recorded", color=_MUTED)
    # Transfers last, so that a thin line is never under a box.
    yield from (_box(span, chunks[span.rank, span.action.stage], frame) for span in spans if span.action.is_compute)
    yield from (_wire(span, frame) for span in spans if not span.action.is_compute)


def _summary(frame: _Frame, idle: Sequence[float]) -> str:
    return f"{frame.stop - frame.start:.4g} ms, {sum(idle) / len(idle):.1%} bubble"


def _frame(spans: Sequence[Span], width: float, row_height: float) -> _Frame:
    start = min((span.start for span in spans), default=0.0)
    stop = max((span.stop for span in spans), default=0.0)
    return _Frame(start, stop, width, row_height, 1 + max((span.rank for span in spans), default=0))


def _idle_shares(spans: Sequence[Span], frame: _Frame) -> list[float]:
    busy = [0.0] * frame.num_ranks
    for span in spans:
        if span.action.kind.is_compute:
            busy[span.rank] += span.stop - span.start
    length = frame.stop - frame.start
    return [max(0.0, 1 - time / length) if length > 0 else 0.0 for time in busy]


def _chunk_numbers(spans: Sequence[Span]) -> dict[tuple[int, int], int]:
    """(rank, stage) -> index of the stage among the rank's stages, which chooses its shade."""
    held = sorted({(span.rank, span.action.stage) for span in spans if span.action.kind.is_compute})
    first = {rank: index for index, (rank, _) in reversed(list(enumerate(held)))}
    return {(rank, stage): index - first[rank] for index, (rank, stage) in enumerate(held)}


def _paint(span: Span, chunk: int) -> tuple[str, str]:
    """Fill and text colour of a compute span."""
    shades = KINDS[span.action.kind].shades
    shade = chunk % len(shades)
    return shades[shade], "#ffffff" if shade == 0 else _DARK_TEXT


def _kinds_shown(spans: Sequence[Span]) -> list[ActionKind]:
    """The compute kinds of the legend: forward and backward, and what else the spans have."""
    found = {span.action.kind for span in spans if span.action.kind.is_compute}
    return [kind for kind in ActionKind if kind in found] or [ActionKind.F, ActionKind.B]


def _legend(spans: Sequence[Span], num_shades: int) -> Iterator[_Box | _Text]:
    x = _LEFT
    for kind in _kinds_shown(spans):
        for shade in KINDS[kind].shades[:num_shades]:
            yield _Box(x, 39, 12, 12, shade, radius=2)
            x += 14
        yield _Text(x + 3, 49, KINDS[kind].words, color=_MUTED)
        x += 12 + 7.0 * len(KINDS[kind].words)
    if num_shades > 1:
        yield _Text(x + 3, 49, "(a shade per chunk)", color=_MUTED)
        x += 130
    if any(not span.action.is_compute for span in spans):
        yield _Box(x, 43.5, 16, 3, _TRANSFER_COLOR, radius=1.5)
        yield _Text(x + 21, 49, "transfer", color=_MUTED)
        x += 86
    yield _Box(x, 39, 12, 12, _TRACK, radius=2, stroke=_GRID)
    yield _Text(x + 17, 49, "idle", color=_MUTED)


def _axis(frame: _Frame) -> Iterator[_Box | _Text]:
    bottom = frame.y(frame.num_ranks)
    for tick in _ticks(frame.stop - frame.start):
        x = frame.x(frame.start + tick)
        yield _Box(x - 0.375, _TOP, 0.75, bottom + 4 - _TOP, _GRID)
        yield _Text(x, bottom + 18, f"{tick:.6g}", size=11, color=_MUTED, anchor="middle")
    yield _Text(_LEFT + frame.plot_width / 2, bottom + 36, "time (ms)", size=11, color=_MUTED, anchor="middle")


def _ticks(length: float) -> list[float]:
    """Round times from 0 to `length`, about ten of them."""
    if length <= 0:
        return [0.0]
    rough = length / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.floor(length / step * (1 + 1e-9)) + 1)]


def _rows(frame: _Frame, idle: Sequence[float]) -> Iterator[_Box | _Text]:
    for rank, share in enumerate(idle):
        y = frame.y(rank)
        middle = y + frame.row_height / 2 + 4
        yield _Text(_LEFT - 10, middle, f"rank {rank}", anchor="end")
        yield _Box(_LEFT, y + 4, frame.plot_width, frame.bar_height, _TRACK, radius=3)
        yield _Text(frame.width - _RIGHT + 8, middle, f"{share:.1%} idle", size=11, color=_MUTED)


def _box(span: Span, chunk: int, frame: _Frame) -> _Box:
    color, ink = _paint(span, chunk)
    x, width = frame.x(span.start), frame.x(span.stop) - frame.x(span.start)
    y = frame.y(span.rank) + 4
    # A narrow gap separates neighbours, unless the box is too narrow for one.
    gap = 0.8 if width > 3 else 0.0
    number = str(span.action.microbatch)
    label = None
    if width >= len(number) * _DIGIT_WIDTH + 3:
        middle = y + frame.bar_height / 2 + 4
        label = _Text(x + (width - gap) / 2, middle, number, size=11, color=ink, anchor="middle")
    return _Box(
        x, y, max(width - gap, 0.1), frame.bar_height, color, radius=2 if width > 6 else 0,
        tooltip=_tooltip(span, frame), label=label,
    )  # fmt: skip


def _wire(span: Span, frame: _Frame) -> _Box:
    x, width = frame.x(span.start), max(frame.x(span.stop) - frame.x(span.start), 0.6)
    y = frame.y(span.rank) + frame.row_height - 3
    return _Box(x, y, width, 2.4, _TRANSFER_COLOR, radius=1.2, tooltip=_tooltip(span, frame))


def _tooltip(span: Span, frame: _Frame) -> str:
    action = span.action
    begin, end = span.start - frame.start, span.stop - frame.start
    return (
        f"{action}: {KINDS[action.kind].words}, stage {action.stage}, microbatch {action.microbatch}\n"
        f"{begin:.3f} to {end:.3f} ms ({end - begin:.3f} ms)"
    )
