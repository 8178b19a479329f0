"""Timelines in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Google, "Trace Event Format", 2016: an object whose `traceEvents` are complete events (`ph` X, with `ts` and `dur` in
microseconds) of a thread (`tid`) of a process (`pid`), and metadata events (`ph` M) that name these. Here a process is
a pipeline rank of one timeline; what overlaps on it has threads of its own, as slices of a thread can only be nested.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from trimaran.runtime.pipeline.action import KINDS, Action
from trimaran.runtime.pipeline.simulate import Span

_US: Final = 1e3  # of a millisecond


def chrome_trace(timelines: Mapping[str, Sequence[Span]]) -> dict[str, Any]:
    """Return the JSON object of a trace.

    Args:
        timelines: by name, such as "1f1b, simulated": spans in milliseconds, each from an origin of its own.
    """
    events: list[dict[str, Any]] = []
    first = 0  # process number of a timeline's rank 0
    for name, spans in timelines.items():
        start = min((span.start for span in spans), default=0.0)
        for rank in sorted({span.rank for span in spans}):
            own = [span for span in spans if span.rank == rank]
            events += _metadata(first + rank, f"{name}: pipeline rank {rank}")
            events += _slices(first + rank, start, own)
        first += 1 + max((span.rank for span in spans), default=-1)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def spans_of(records: Sequence[Sequence[Any]], num_ranks: int) -> list[Span]:
    """Return the spans of [rank, "2F0", start_ms, stop_ms] records, as timeline.json has.

    Raises:
        ValueError: a record is malformed, or its rank is impossible: the picture has a row for every rank up to the
            highest, so a huge one would fill the memory.
    """
    spans = [Span(int(rank), Action.parse(str(text)), float(start), float(stop)) for rank, text, start, stop in records]
    for span in spans:
        if not 0 <= span.rank < min(num_ranks, len(spans)):
            raise ValueError(
                f"rank {span.rank} of action {span.action} is not one of the {num_ranks} ranks that have actions"
            )
    return spans


def _metadata(pid: int, name: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}},
    ]


def _slices(pid: int, start: float, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """Yield the events of one rank, each thread's name before its first."""
    ends: dict[bool, list[float]] = {}  # compute or not -> end of the last slice of each of its threads
    threads: dict[tuple[bool, int], int] = {}
    for span in sorted(spans, key=lambda each: (each.start, each.stop)):
        action = span.action
        lanes = ends.setdefault(action.is_compute, [])
        lane = next((number for number, end in enumerate(lanes) if end <= span.start), len(lanes))
        lanes[lane : lane + 1] = [span.stop]
        if (action.is_compute, lane) not in threads:
            threads[action.is_compute, lane] = tid = len(threads)
            words = ("compute" if action.is_compute else "transfers") + f" {lane + 1}" * bool(lane)
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": words}}
        yield {
            "ph": "X", "name": str(action), "cat": KINDS[action.kind].words, "pid": pid,
            "tid": threads[action.is_compute, lane], "ts": (span.start - start) * _US,
            "dur": (span.stop - span.start) * _US,
            "args": {"action": KINDS[action.kind].words, "stage": action.stage, "microbatch": action.microbatch},
        }  # fmt: skip
