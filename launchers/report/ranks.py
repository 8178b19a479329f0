"""What ranks hold and where they live, as HTML: bars of memory by part, and a map of nodes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.pages.charts import COLORS, Bar, Piece, bar_table
from trimaran.runtime.plan.brief import size

MOST_BARS: Final = 64
_MOST_NODES: Final = 48  # of the map of ranks
_MOST_RANKS: Final = 1 << 20
_PARTS: Final = (*COLORS, "pale")


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


def memory_bars(
    memory: Sequence[Mapping[str, float]], limit: float | None, place: str, peaks: Sequence[float | None]
) -> str:
    """Return bars by part, one for each pipeline rank, with the place's line, and marks of what was measured.

    Args:
        memory: by pipeline rank, bytes by part.
        limit: bytes of the place that is named; None where it is not known.
        peaks: bytes that each pipeline rank's tensors took at most, None or missing where that is not known.
    """
    names = [name for name in memory[0] if any(rank.get(name) for rank in memory)]
    colors = dict(zip(names, _PARTS, strict=False))
    rows = []
    for rank, held in enumerate(memory[:MOST_BARS]):
        peak = peaks[rank] if rank < len(peaks) else None
        told = f"{size(sum(held.values()))} planned" + ("" if peak is None else f", {size(peak)} measured")
        rows.append(Bar(f"pipeline rank {rank}", list(_pieces(held, colors)), told, mark=peak))
    longest = max([*(sum(held.values()) for held in memory), *(peak or 0.0 for peak in peaks)])
    is_near = limit is not None and limit <= 20 * longest  # else the bars would be too short to see
    title = "what each pipeline rank holds at most" + (f"; dashed: {size(limit)} of {place}" if is_near else "")
    title += "; upright: measured" if any(peak is not None for peak in peaks) else ""
    return bar_table(title, rows, limit if is_near else None, colors)


def _pieces(held: Mapping[str, float], colors: Mapping[str, str]) -> Iterator[Piece]:
    start = 0.0
    for name, color in colors.items():
        stop = start + held.get(name, 0.0)
        yield Piece(start, stop, color, f"{name} {size(stop - start)}")
        start = stop


def peak_bars(peaks: Sequence[float], kind: object = None) -> str:
    """Return the peaks of all ranks as bars, the largest first where they are many; `kind`: what they are peaks of."""
    ranked = sorted(enumerate(peaks), key=lambda item: -item[1])[:MOST_BARS] if len(peaks) > MOST_BARS else [
        *enumerate(peaks)
    ]  # fmt: skip
    more = f", the {len(ranked)} largest of {len(peaks):,}" if len(ranked) < len(peaks) else ""
    rows = [Bar(f"rank {rank}", [Piece(0.0, peak, "blue")], size(peak)) for rank, peak in ranked]
    what = f", {kind}" if isinstance(kind, str) else ""
    return bar_table(f"the most memory that each rank has taken{what}{more}", rows)


def rank_map(grid: Grid) -> str:
    """Return a row a node and a cell a rank, coloured by pipeline rank, below the words about what crosses nodes."""
    rows = []
    for node in range(grid.nodes):
        cells = []
        for rank in range(node * grid.width, min(grid.ranks, (node + 1) * grid.width)):
            where = grid.coordinates(rank)
            text = " · ".join(f"{axis} {index}" for axis, index in where.items()) or "rank 0"
            cells.append(f'<li class="{COLORS[where.get("pp", 0) % len(COLORS)]}">{text}</li>')
        rows.append(f'<ul class="node"><li>node {node}</li>{"".join(cells)}</ul>')
    more = -(-grid.ranks // grid.width) - grid.nodes
    shown = f"; {counted(more, 'further node')} not shown" if more > 0 else ""
    return f"<h3>Where ranks live: {escape(grid.crossings)}{shown}</h3>\n" + "\n".join(rows)
