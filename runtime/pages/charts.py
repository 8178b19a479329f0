"""Charts of a page: what web/charts.js draws with uPlot, a table of its values below, and bars that are HTML alone.

Without JavaScript the tables and bars are there. Colours are names of web/page.css, or places from 0 to 1 on a ramp.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

from trimaran.runtime.pages.html import grid

Point = tuple[float, float]
Color = str | float

COLORS: Final = ("blue", "orange", "red", "green", "violet", "teal", "slate", "gold")
_PARTS = 1 << 50  # of one, to which an average is exact
_MOST_POINTS: Final = 1500  # a chart is about 900 pixels wide; more points only make the file bigger
_MOST_ROWS: Final = 24  # of a table of values
_MOST_COLUMNS: Final = 6


@dataclass(frozen=True)
class Series:
    """Points of a chart, in order of x where a line joins them.

    Args:
        label: in the legend, "" for none.
        line: "-", ":", "-." or "--" joins the points; "" marks each of them.
        dots: points of a line are marked too.
        bounds: of each point the ends of its interval, upright.
        sideways: of each point the ends of its interval, lying.
        shades: of each point its place on the ramp, in place of the colour.
        words: of each point what is told of it, in place of its y.
        more_x: of each point its place by other names of the x axis, see `Look`.
        name: in the table; the label, or the y axis, if "".
    """

    points: Sequence[Point]
    label: str = ""
    color: Color = "blue"
    line: str = ""
    marker: str = "o"
    bounds: Sequence[Point] = ()
    sideways: Sequence[Point] = ()
    width: float = 1.5
    alpha: float = 1.0
    dots: bool = False
    shades: Sequence[float] = ()
    words: Sequence[str] = ()
    more_x: Sequence[Sequence[float]] = ()
    name: str = ""


@dataclass(frozen=True)
class Band:
    """An area between two curves: of each x its low and high."""

    bounds: Sequence[tuple[float, float, float]]
    label: str = ""
    color: str = "blue"


@dataclass(frozen=True)
class Marks:
    """Places on the x axis; `x` has them by each name of the axis. A tall mark is a line across the chart."""

    x: Sequence[Sequence[float]]
    label: str
    color: str = "slate"
    marker: str = "o"
    tall: bool = False


@dataclass(frozen=True)
class Look:
    """How a chart looks.

    Args:
        x: what the x axis has.
        note: what else stands above the chart, beside the y axis.
        log: which axes are logarithmic at first: "", "x", "y" or "xy".
        zero: the y axis begins at 0, if nothing is below.
        ticks: names of places on the x axis, for listed values.
        span: the places that the x axis reaches in any case.
        more_x: further names of the x axis, to choose from.
    """

    x: str
    y: str
    note: str = ""
    log: str = ""
    zero: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    more_x: Sequence[str] = ()


def colors(count: int) -> list[Color]:
    """Return so many places on the ramp."""
    return [round(index / max(1, count - 1), 3) for index in range(count)]


def plot(
    name: str, look: Look, series: Sequence[Series], bands: Sequence[Band] = (), marks: Sequence[Marks] = ()
) -> str:
    """Return a chart as a ``<figure>``; `name` is unique on the page."""
    drawn = [each for each in series if each.points]
    if not drawn:
        return f"<p>{escape(look.y)}: nothing to draw: not recorded, or never a finite number.</p>"
    data: dict[str, Any] = {
        "kind": "lines", "x": [look.x, *look.more_x], "y": look.y, "log": look.log, "zero": look.zero,
        "lines": [_line(each, look) for each in drawn],
        "bands": [
            {"x": xs, "low": lows, "high": highs, "color": band.color, "label": band.label}
            for band in bands
            for xs, lows, highs in [map(_numbers, zip(*band.bounds, strict=True))]
        ],
        "marks": [{**vars(each), "x": [_numbers(xs) for xs in each.x]} for each in marks if any(each.x)],
    }  # fmt: skip
    if look.ticks:
        data["ticks"] = {"places": _numbers(look.ticks), "names": list(look.ticks.values())}
    if look.span is not None:
        data["span"] = _numbers(look.span)
    return figure(name, look.y, data, _values(look, drawn), look.note)


def figure(name: str, title: str, data: Mapping[str, Any], values: str, note: str = "") -> str:
    """Return a ``<figure>`` that web/charts.js draws, with a table of its values."""
    more = f' <span class="soft">{escape(note)}</span>' if note else ""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure class="chart" id="{escape(name)}">\n<figcaption>{escape(title)}{more}</figcaption>\n'
        f'<div class="plot"></div>\n<script type="application/json">{text}</script>\n'
        f"<details><summary>Values</summary>{values}</details>\n</figure>"
    )


def _line(series: Series, look: Look) -> dict[str, Any]:
    kept = thin([y for _, y in series.points])
    found: dict[str, Any] = {
        "label": series.label, "name": series.name or series.label or look.y, "color": series.color,
        "line": series.line, "width": series.width, "alpha": series.alpha, "marker": series.marker,
        "dots": series.dots or not series.line or len(kept) == 1,
        "x": [_numbers(xs[at] for at in kept) for xs in ([x for x, _ in series.points], *series.more_x)],
        "y": _numbers(series.points[at][1] for at in kept),
    }  # fmt: skip
    for (low, high), ends in ((("low", "high"), series.bounds), (("left", "right"), series.sideways)):
        if ends:
            found |= {low: _numbers(ends[at][0] for at in kept), high: _numbers(ends[at][1] for at in kept)}
    if series.words:
        found["words"] = [series.words[at] for at in kept]
    return found | ({"shades": _numbers(series.shades[at] for at in kept)} if series.shades else {})


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Return numbers as short as a picture of a thousand pixels allows, None for those that can't be drawn."""
    return [_number(value) if math.isfinite(value) else None for value in values]


def _number(value: float) -> float:
    short = float(f"{value:.7g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _values(look: Look, series: Sequence[Series]) -> str:
    """Return a table by x of few series, else one with the ends and extremes of each."""
    names = [each.name or each.label or look.y for each in series]
    if len(series) > _MOST_COLUMNS:
        shown = ("first", "last", "lowest", "highest")
        ends = [(points[0], points[-1], *_extremes(points)) for points in (each.points for each in series)]
        rows = [[name, *(f"{_told(y)} at {_told(x)}" for x, y in four)] for name, four in zip(names, ends, strict=True)]
        return grid((look.y, *shown), rows)
    places = sorted({x for each in series for x, _ in each.points})
    fewest = min((sorted({x for x, _ in each.points}) for each in series), key=len)
    rare = [] if fewest == places else _spread(fewest, _MOST_ROWS // 2)
    chosen = sorted({*rare, *_spread(places, _MOST_ROWS - len(rare))})
    columns = [_cells(each) for each in series]
    rows = [[look.ticks.get(x) or _told(x), *(column.get(x, "") for column in columns)] for x in chosen]
    rest = f'<p class="soft">{len(chosen):,} of {len(places):,} places on the axis.</p>' if chosen != places else ""
    return grid((look.x, *names), rows) + rest


def _cells(series: Series) -> dict[float, str]:
    found: dict[float, str] = {}
    for place, (x, y) in enumerate(series.points):
        text = series.words[place] if series.words else _told(y)
        if series.bounds:
            text += " ({} to {})".format(*map(_told, series.bounds[place]))
        found[x] = f"{found[x]}; {text}" if x in found else text
    return found


def _extremes(points: Sequence[Point]) -> tuple[Point, Point]:
    return min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])


def _spread(values: Sequence[float], most: int) -> list[float]:
    """Return the first, the last, and what lies evenly between."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _told(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e15 and float(value).is_integer() else f"{value:.5g}"


@dataclass(frozen=True)
class Piece:
    """A piece of a bar, from a place to another one; colours are names of web/page.css."""

    start: float
    stop: float
    color: str
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of bars: what it is about, its pieces, and what it comes to in words.

    Args:
        mark: a place that is marked.
        line: pieces are drawn as a thin line.
    """

    label: str
    pieces: Sequence[Piece]
    text: str
    mark: float | None = None
    line: bool = False


def bar_table(title: str, rows: Sequence[Bar], limit: float | None = None, key: Mapping[str, str] | None = None) -> str:
    """Return bars below each other as a table, which reads without the pictures too.

    Args:
        limit: a place that all rows mark.
        key: colours by what they mean.
    """
    places = [place for row in rows for piece in row.pieces for place in (piece.start, piece.stop)]
    places += [row.mark for row in rows if row.mark is not None] + ([] if limit is None else [limit])
    places += [] if any(row.line for row in rows) else [0.0]  # bars begin at 0, intervals where the first does
    low, high = min(places), max(places)
    size = (high - low) or 1.0

    def share(place: float) -> str:
        return f"{100 * (place - low) / size:.4g}%"

    body = []
    for row in rows:
        inner = "".join(
            f'<rect class="{piece.color}" x="{share(piece.start)}" y="{7 if row.line else 0}" '
            f'width="{share(low + piece.stop - piece.start)}" height="{2 if row.line else 16}">'
            f"<title>{escape(piece.title)}</title></rect>"
            for piece in row.pieces
        )
        for at, kind in ((limit, "limit"), (row.mark, "mark")):
            if at is not None:
                inner += f'<line class="{kind}" x1="{share(at)}" x2="{share(at)}" y1="-1" y2="17"/>'
        picture = f'<svg class="bar" aria-hidden="true">{inner}</svg>'
        body.append(f'<tr><th scope="row">{escape(row.label)}</th><td>{picture}</td><td>{escape(row.text)}</td></tr>\n')
    entries = "".join(
        f'<li><span class="swatch {color}"></span>{escape(meaning)}</li>' for meaning, color in (key or {}).items()
    )
    return (
        f'<table class="bars">\n<caption>{escape(title)}</caption>\n{"".join(body)}</table>'
        + (f'\n<ul class="legend key">{entries}</ul>' if entries else "")
    )  # fmt: skip


def bars(label: str, labels: Sequence[str], values: Sequence[float]) -> str:
    """Return horizontal bars, one below the other.

    Args:
        labels: of each bar.
    """
    if not any(values):
        return f"<p>{escape(label)}: none.</p>"
    texts = [f"{value:,.0f}" if value >= 10 else f"{value:,.3g}" for value in values]
    triples = zip(labels, values, texts, strict=True)
    return bar_table(label, [Bar(name, [Piece(0.0, value, "pale")], text) for name, value, text in triples])


def intervals(label: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """Return points with their intervals, one below the other.

    Args:
        rows: label, value, and half the width of the interval of each.
    """
    return bar_table(label, [
        Bar(name, [Piece(value - half, value + half, "blue")], f"{value:.4g} ± {half:.2g}", mark=value, line=True)
        for name, value, half in rows
    ])  # fmt: skip


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the centred moving average over about a fiftieth of the run.

    Centred, because an average of the past alone lags behind a falling loss and reads as if training were slower. The
    window shrinks towards both ends and stays symmetric there.
    """
    reach = max(5, len(points) // 100)
    # In whole numbers nothing of a loss is lost beside the sum of a spike before it.
    sums = [0, *itertools.accumulate(round(y * _PARTS) for _, y in points)]
    found = []
    for index, (x, _) in enumerate(points):
        side = min(reach, index, len(points) - 1 - index)
        found.append((x, (sums[index + side + 1] - sums[index - side]) / ((2 * side + 1) * _PARTS)))
    return found


def thin(values: Sequence[float]) -> list[int]:
    """Return the places of at most 1500 values: the lowest and the highest of every stretch, so no spike is lost."""
    if len(values) <= _MOST_POINTS:
        return list(range(len(values)))
    stretch = math.ceil(2 * len(values) / _MOST_POINTS)
    kept = []
    for start in range(0, len(values), stretch):
        part = range(start, min(start + stretch, len(values)))
        kept += sorted({min(part, key=values.__getitem__), max(part, key=values.__getitem__)})
    return kept
