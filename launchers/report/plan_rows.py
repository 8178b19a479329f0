"""The report's rows of what was planned beside what was measured: memory of the fullest rank, time of a step."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from trimaran.runtime.plan.brief import Brief, table_of

_WAITING: Final = ("bubble", "transfers")
_AFTER: Final = ("data-parallel", "optimizer")
Rows = list[tuple[str, str, str]]
"""What, planned, measured."""


@dataclass(frozen=True)
class PlanRows:
    """What a section about the plan shows.

    Attributes:
        problem: why nothing can be shown; "" where it can.
        brief: None where there is a problem.
        peaks: bytes that each pipeline rank's tensors took at most; None where that is not known.
    """

    problem: str
    sentences: list[str]
    memory: Rows
    times: Rows
    brief: Brief | None = None
    peaks: Sequence[float | None] = ()


def plan_rows(
    plan: Mapping[str, Any],
    memory: Mapping[str, Any] | None,
    timeline: Mapping[str, Any] | None,
    steps: Sequence[float],
) -> PlanRows:
    """Return the rows of a run's plan.json, memory.json and timeline.json, which anyone may have written.

    Args:
        steps: seconds of the measured steps.
    """
    try:
        brief = Brief.model_validate(plan)
    except ValidationError as error:
        first = error.errors()[0]
        return PlanRows(f"{'.'.join(map(str, first['loc']))}, {first['msg']}", [], [], [])
    sentences, measured = list(_sentences(memory, brief)), _measured(memory)
    peaks = [each.get("peak") for each in measured]
    return PlanRows("", sentences, table_of(brief, measured), list(_times(steps, timeline, brief)), brief, peaks)


def _sentences(memory: Mapping[str, Any] | None, brief: Brief) -> Iterator[str]:
    yield f"Planned for {brief.place}, before the run began."
    for what, why in brief.why_not.items():
        yield f"Not planned: {what}, for {why}." if what != "context" else f"Of memory, {why}."
    kind = None if memory is None else memory.get("peak_is")
    if isinstance(kind, str):
        yield f"The measured peak is what was {kind}."


def _measured(memory: Mapping[str, Any] | None) -> list[dict[str, float]]:
    """Return what pipeline ranks held; what is no number is left out, for anyone may have written the file."""
    rows = [] if memory is None else memory.get("by_pipeline_rank")
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return []
    return [
        {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        if isinstance(row, Mapping)
        else {}
        for row in rows
    ]


def _times(steps: Sequence[float], timeline: Mapping[str, Any] | None, brief: Brief) -> Iterator[tuple[str, str, str]]:
    step = statistics.median(steps) if steps else None
    if brief.seconds is None and step is None:
        return
    compute, waiting, after = _measured_parts(timeline, step)
    planned = brief.parts
    if planned:
        waits, tail = (sum(planned.get(name, 0.0) for name in names) for names in (_WAITING, _AFTER))
        yield "computing and its exchanges", _seconds(sum(planned.values()) - waits - tail), _seconds(compute)
        yield "waiting for other pipeline ranks", _seconds(waits), _seconds(waiting)
        yield "after the pipeline: data-parallel, optimizer", _seconds(tail), _seconds(after)
        for name, value in sorted(planned.items(), key=lambda item: -item[1]):
            yield f"of it {name}", _seconds(value), ""
    yield "in all (median)", _seconds(brief.seconds), _seconds(step)


def _measured_parts(
    timeline: Mapping[str, Any] | None, step: float | None
) -> tuple[float | None, float | None, float | None]:
    """Return the seconds in which a rank computes, in which it waits, and what is left of a step; None: unknown."""
    try:
        spans = [(float(start), float(stop)) for _, _, start, stop in (timeline or {})["measured"]]
        ranks = int((timeline or {})["num_ranks"])
        makespan = (max(stop for _, stop in spans) - min(start for start, _ in spans)) / 1e3
        busy = sum(stop - start for start, stop in spans) / 1e3 / ranks
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None, None, None
    return busy, max(0.0, makespan - busy), None if step is None else max(0.0, step - makespan)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4g} s"
