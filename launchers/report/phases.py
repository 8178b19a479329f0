"""The section of a report about where the time went: of the run, and of the step whose timeline is known."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimaran.runtime.pages.charts import Bar, Piece, bar_table
from trimaran.runtime.pages.html import section
from trimaran.runtime.pages.run_folder import Run, finite_points
from trimaran.runtime.pipeline.action import KINDS, Action
from trimaran.runtime.plan.brief import duration

Phases = Sequence[tuple[str, float]]


def phases_section(run: Run) -> str:
    """Return bars of the seconds in steps, evaluations and saves, and of the parts of a step; "" of an unknown."""
    tables = []
    of_run = list(run_phases(run))
    if of_run:
        tables.append(_bars("of the run, without its preparation", of_run))
    if of_step := list(_of_step(run)):
        step = (run.timeline or {}).get("step")
        which = f"step {step}" if isinstance(step, int) else "the last step"
        tables.append(_bars(f"of {which}, averaged over pipeline ranks", of_step))
    return section("Where the time went", *tables) if tables else ""


def run_phases(run: Run) -> Iterator[tuple[str, float]]:
    """Yield what a run spent its seconds on."""
    if steps := [milliseconds / 1e3 for _, milliseconds in finite_points(run.steps, "step_time_ms")]:
        yield "steps", sum(steps)
    for name, column in (("evaluations", "evaluation_s"), ("saves", "save_s")):
        if seconds := [value for _, value in finite_points(run.times, column)]:
            yield name, sum(seconds)


def _of_step(run: Run) -> Iterator[tuple[str, float]]:
    try:
        found = _parts(run.timeline or {})
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return  # the section about the timeline says what is wrong with it
    yield from found.items()
    step = (run.timeline or {}).get("step")
    whole = dict(finite_points(run.steps, "step_time_ms")).get(step) if isinstance(step, int) else None
    if whole is not None:
        yield "after the pipeline: gradients over dp, optimizer", max(0.0, whole / 1e3 - sum(found.values()))


def _parts(timeline: Mapping[str, Any]) -> dict[str, float]:
    spans = [(Action.parse(str(text)), float(start), float(stop)) for _, text, start, stop in timeline["measured"]]
    ranks = int(timeline["num_ranks"])
    found: dict[str, float] = {}
    for action, start, stop in spans:
        if action.is_compute:
            words = KINDS[action.kind].words
            found[words] = found.get(words, 0.0) + (stop - start) / 1e3 / ranks
    whole = (max(stop for *_, stop in spans) - min(start for _, start, _ in spans)) / 1e3
    return {**found, "waiting for other pipeline ranks": max(0.0, whole - sum(found.values()))}


def _bars(title: str, phases: Phases) -> str:
    whole = sum(seconds for _, seconds in phases) or 1.0
    return bar_table(title, [
        Bar(name, [Piece(0.0, seconds, "blue")], f"{_told(seconds)}, {seconds / whole:.1%}") for name, seconds in phases
    ])  # fmt: skip


def _told(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else duration(seconds)
