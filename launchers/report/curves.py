"""Curves of runs over their steps, or over the tokens or seconds of these, with marks of saves and restarts."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from trimaran.models.fields import counted
from trimaran.runtime.pages.charts import Look, Marks, Point, Series, plot, smooth
from trimaran.runtime.pages.run_folder import Run, finite_points, is_finite

_MORE_X = ("tokens", "seconds")
PEAK_MEMORY = "peak memory of the fullest rank, GiB"
_MANY = 50  # steps, from which on a smoothed line helps


class Clock:
    """What a run had seen and spent at each of its steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._steps = [int(row["step"] or 0) for row in run.steps]

    @cached_property
    def _values(self) -> list[Sequence[float]]:
        """By the names of `_MORE_X`, the value after 0, 1, ... rows; none where a row lacks one."""
        tokens, times = ([row.get(name) for row in self.run.steps] for name in ("tokens_seen", "step_time_ms"))
        if not self._steps or not all(value is not None and is_finite(value) for value in (*tokens, *times)):
            return []
        seconds = accumulate((value or 0.0) / 1e3 for value in times)
        return [[0.0, *(value or 0.0 for value in tokens)], [0.0, *seconds]]

    @property
    def knows(self) -> bool:
        """Whether tokens and seconds of every step are known."""
        return bool(self._values)

    def at(self, steps: Sequence[float]) -> list[list[float]]:
        """Return tokens and seconds at these steps."""
        places = [bisect_right(self._steps, step) for step in steps]
        return [[values[place] for place in places] for values in self._values]


def over_steps(
    name: str, look: Look, lines: Sequence[tuple[Clock, Series]], marks: Sequence[tuple[Clock, Marks]] = ()
) -> str:
    """Return a chart of series over steps that can be shown over tokens and seconds too, where all runs have these."""
    if not all(clock.knows for clock, _ in (*lines, *marks)):
        return plot(name, look, [series for _, series in lines], marks=[each for _, each in marks])
    series = [replace(each, more_x=clock.at([x for x, _ in each.points])) for clock, each in lines]
    placed = [replace(each, x=[each.x[0], *clock.at(each.x[0])]) for clock, each in marks]
    return plot(name, replace(look, more_x=_MORE_X), series, marks=placed)


def step_points(run: Run, column: str) -> list[Point]:
    """Return (step, value) of a column of the steps, those that are finite numbers; bytes in GiB."""
    scale = 2.0**30 if column.endswith("_bytes") else 1.0
    return [(step, value / scale) for step, value in finite_points(run.steps, column)]


def losses(run: Run, color: str, name: str = "") -> Iterator[Series]:
    """Yield the losses of a run: of training, smoothed where that helps, and held out; `name`: of one among several."""
    points, own = finite_points(run.steps, "loss"), f"{name}, " if name else ""
    if len(points) > _MANY:
        if not name:
            yield Series(points, "training", "pale", "-")
        yield Series(smooth(points), f"{own}training, smoothed", color, "-", width=2.0)
    else:
        yield Series(points, f"{own}training", color, "-")
    held_out = "orange" if not name else color
    points = finite_points(run.evaluations, "held_out_loss")
    yield Series(points, f"{own}held-out", held_out, "--" if name else "-", width=2.0, dots=True)


def events(run: Run, color: str = "slate", name: str = "") -> Iterator[Marks]:
    """Yield marks of saves, and of starts that went on from one."""
    own = f"{name}, " if name else ""
    saves = [float(row["step"] or 0) for row in run.times if "save_s" in row]
    restarts = [float(row["step"] or 0) for row in run.times if "started_at" in row and row["step"]]
    if saves and not name:
        yield Marks([saves], f"saved ({counted(len(saves), 'time')})", color, "s")
    if restarts:
        yield Marks([restarts], f"{own}resumed", "red" if not name else color, "D", tall=True)
    if lost := [float(row["step"] or 0) for row in run.steps if not is_finite(row["loss"])]:
        yield Marks([lost], f"{own}not a number", "red", "x")
