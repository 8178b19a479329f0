"""Timelines as pictures: the actions of every rank over time, from simulated or measured spans.

Each kind of action has its colour (`KINDS`), the chunks of a rank (its virtual stages) go from dark to light, and the
pale background is idle time. A thin line under a row is a transfer on the wire, or a wait for one.
"""

import math
from collections.abc import Sequence
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
        return _TOP + self.num_ranks * self.row_height + _BOTTOM


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
    idle = _idle_shares(spans, frame)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'width="{frame.width:g}" height="{frame.height:g}" style="max-width:100%;height:auto" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">'
    )
    parts = [
        opening,
        f"<title>{escape(title)}</title>",
        f'<rect width="{frame.width:g}" height="{frame.height:g}" fill="#ffffff"/>',
        _text(_LEFT, 26, title, size=16, weight=600),
        *_legend(spans, frame),
        *_axis(frame),
        *_rows(frame, idle),
    ]
    if spans:
        parts.append(_text(frame.width - _RIGHT, 26, _summary(frame, idle), color=_MUTED, anchor="end"))
    else:
        parts.append(_text(_LEFT + 8, _TOP + row_height / 2 + 4, "no spans recorded", color=_MUTED))
    chunks = _chunk_numbers(spans)
    # Transfers last, so that a thin line is never under a box.
    parts += [_box(span, chunks[span.rank, span.action.stage], frame) for span in spans if span.action.kind.is_compute]
    parts += [_wire(span, frame) for span in spans if not span.action.kind.is_compute]
    return "\n".join([*parts, "</svg>"])


def save_png(
    spans: Sequence[Span], path: str | Path, title: str = "", *, width: float = 1100.0, row_height: float = 34.0
) -> None:
    """Draw the same picture with matplotlib and write it to `path` as a PNG of 2 x `width` pixels.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    frame = _frame(spans, width, row_height)
    idle = _idle_shares(spans, frame)
    figure = Figure(figsize=(frame.width / 100, frame.height / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    plot_height = frame.num_ranks * frame.row_height
    axes = figure.add_axes(
        (_LEFT / frame.width, _BOTTOM / frame.height, frame.plot_width / frame.width, plot_height / frame.height)
    )
    axes.set_xlim(frame.start, frame.stop if frame.stop > frame.start else frame.start + 1)
    axes.set_ylim(frame.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(frame.num_ranks), [f"rank {rank}" for rank in range(frame.num_ranks)])
    ticks = _ticks(frame.stop - frame.start)
    axes.set_xticks([frame.start + tick for tick in ticks], [f"{tick:.6g}" for tick in ticks])
    axes.set_xlabel("time (ms)", color=_MUTED, fontsize=8)
    axes.tick_params(length=0, colors=_INK, labelsize=8)
    axes.spines[:].set_visible(False)
    _draw_png_rows(axes, spans, frame, idle)
    x, y = _LEFT / frame.width, 1 - 26 / frame.height
    figure.text(x, y, title, size=11, weight="bold", color=_INK, parse_math=False)
    if spans:
        figure.text(1 - _RIGHT / frame.width, y, _summary(frame, idle), size=8, color=_MUTED, ha="right")
    handles = [Patch(color=KINDS[kind].shades[0], label=KINDS[kind].words) for kind in _kinds_shown(spans)]
    handles += [Patch(color=_TRANSFER_COLOR, label="transfer"), Patch(facecolor=_TRACK, edgecolor=_GRID, label="idle")]
    anchor = (x, 1 - 36 / frame.height)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=anchor,
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        borderpad=0,
        borderaxespad=0,
    )
    figure.savefig(path, format="png")


def _draw_png_rows(axes: "Axes", spans: Sequence[Span], frame: _Frame, idle: Sequence[float]) -> None:
    bar = frame.bar_height / frame.row_height
    for rank, share in enumerate(idle):
        axes.broken_barh([(frame.start, frame.stop - frame.start)], (rank - bar / 2, bar), color=_TRACK, linewidth=0)
        axes.annotate(
            f"{share:.1%} idle",
            (1, rank),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            size=8,
            color=_MUTED,
            va="center",
        )
    chunks = _chunk_numbers(spans)
    for span in spans:
        duration = span.stop - span.start
        if not span.action.kind.is_compute:
            axes.broken_barh(
                [(span.start, duration)], (span.rank + bar / 2 + 0.02, 0.07), color=_TRANSFER_COLOR, linewidth=0
            )
            continue
        color, ink = _paint(span, chunks[span.rank, span.action.stage])
        axes.broken_barh(
            [(span.start, duration)], (span.rank - bar / 2, bar), facecolor=color, edgecolor="white", linewidth=0.6
        )
        label = str(span.action.microbatch)
        if _label_fits(label, frame.x(span.stop) - frame.x(span.start)):
            axes.text(
                span.start + duration / 2, span.rank, label, ha="center", va="center_baseline", size=7.5, color=ink
            )


def _summary(frame: _Frame, idle: Sequence[float]) -> str:
    return f"{frame.stop - frame.start:.4g} ms, {sum(idle) / len(idle):.1%} bubble"


def _label_fits(label: str, width: float) -> bool:
    return width >= len(label) * _DIGIT_WIDTH + 3


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


def _text(
    x: float, y: float, text: str, *, size: int = 12, color: str = _INK, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _legend(spans: Sequence[Span], frame: _Frame) -> list[str]:
    num_shades = 1 + max(_chunk_numbers(spans).values(), default=0)
    parts = []
    x = _LEFT
    for kind in _kinds_shown(spans):
        word = KINDS[kind].words
        for shade in KINDS[kind].shades[:num_shades]:
            parts.append(f'<rect x="{x:.1f}" y="39" width="12" height="12" rx="2" fill="{shade}"/>')
            x += 14
        parts.append(_text(x + 3, 49, word, color=_MUTED))
        x += 12 + 7.0 * len(word)
    if num_shades > 1:
        parts.append(_text(x + 3, 49, "(a shade per chunk)", color=_MUTED))
        x += 130
    if any(not span.action.kind.is_compute for span in spans):
        parts.append(f'<rect x="{x:.1f}" y="43.5" width="16" height="3" rx="1.5" fill="{_TRANSFER_COLOR}"/>')
        parts.append(_text(x + 21, 49, "transfer", color=_MUTED))
        x += 86
    parts.append(f'<rect x="{x:.1f}" y="39" width="12" height="12" rx="2" fill="{_TRACK}" stroke="{_GRID}"/>')
    parts.append(_text(x + 17, 49, "idle", color=_MUTED))
    return parts


def _axis(frame: _Frame) -> list[str]:
    bottom = frame.y(frame.num_ranks)
    parts = []
    for tick in _ticks(frame.stop - frame.start):
        x = frame.x(frame.start + tick)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP:g}" x2="{x:.1f}" y2="{bottom + 4:.1f}" '
            f'stroke="{_GRID}" stroke-width="0.75"/>'
        )
        parts.append(_text(x, bottom + 18, f"{tick:.6g}", size=11, color=_MUTED, anchor="middle"))
    parts.append(_text(_LEFT + frame.plot_width / 2, bottom + 36, "time (ms)", size=11, color=_MUTED, anchor="middle"))
    return parts


def _ticks(length: float) -> list[float]:
    """Round times from 0 to `length`, about ten of them."""
    if length <= 0:
        return [0.0]
    rough = length / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.floor(length / step * (1 + 1e-9)) + 1)]


def _rows(frame: _Frame, idle: Sequence[float]) -> list[str]:
    parts = []
    for rank, share in enumerate(idle):
        y = frame.y(rank)
        middle = y + frame.row_height / 2 + 4
        parts.append(_text(_LEFT - 10, middle, f"rank {rank}", anchor="end"))
        parts.append(
            f'<rect x="{_LEFT:g}" y="{y + 4:.1f}" width="{frame.plot_width:.1f}" '
            f'height="{frame.bar_height:.1f}" rx="3" fill="{_TRACK}"/>'
        )
        parts.append(_text(frame.width - _RIGHT + 8, middle, f"{share:.1%} idle", size=11, color=_MUTED))
    return parts


def _box(span: Span, chunk: int, frame: _Frame) -> str:
    color, ink = _paint(span, chunk)
    x, width = frame.x(span.start), frame.x(span.stop) - frame.x(span.start)
    y = frame.y(span.rank) + 4
    # A narrow gap separates neighbours, unless the box is too narrow for one.
    gap = 0.8 if width > 3 else 0.0
    box = (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width - gap, 0.1):.2f}" height="{frame.bar_height:.1f}" '
        f'rx="{2 if width > 6 else 0}" fill="{color}"/>'
    )
    label = str(span.action.microbatch)
    text = ""
    if _label_fits(label, width):
        text = _text(x + (width - gap) / 2, y + frame.bar_height / 2 + 4, label, size=11, color=ink, anchor="middle")
    return f"<g>{_tooltip(span, frame)}{box}{text}</g>"


def _wire(span: Span, frame: _Frame) -> str:
    x, width = frame.x(span.start), max(frame.x(span.stop) - frame.x(span.start), 0.6)
    y = frame.y(span.rank) + frame.row_height - 3
    return (
        f'<g>{_tooltip(span, frame)}<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="2.4" rx="1.2" '
        f'fill="{_TRANSFER_COLOR}"/></g>'
    )


def _tooltip(span: Span, frame: _Frame) -> str:
    action = span.action
    begin, end = span.start - frame.start, span.stop - frame.start
    return (
        f"<title>{action}: {KINDS[action.kind].words}, stage {action.stage}, microbatch {action.microbatch}\n"
        f"{begin:.3f} to {end:.3f} ms ({end - begin:.3f} ms)</title>"
    )
