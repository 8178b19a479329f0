"""The section of a report about its pipeline's timeline: as it ran and as simulated, and why that step took so long."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.pages.charts import figure
from trimaran.runtime.pages.html import grid, section
from trimaran.runtime.pages.run_folder import Run, finite_points, number
from trimaran.runtime.pipeline.action import KINDS, ActionKind
from trimaran.runtime.pipeline.simulate import Span
from trimaran.runtime.pipeline.trace import spans_of

_PICTURES: Final = {"measured": "As it ran", "simulated": "Simulated at the median time of each kind of action"}
_ROW_HEIGHT: Final = 34
_MOST_ROWS: Final = 400  # of the table of a picture
_DARK, _LIGHT = "#0f172a", "#ffffff"


def timeline_section(run: Run) -> str:
    """Return the timeline as it ran above the simulated one, or what is wrong with the file."""
    if run.timeline is None:
        return ""
    try:
        ranks = int(run.timeline["num_ranks"])
        spans = {key: _spans(run.timeline[key], ranks) for key in _PICTURES}
        step = int(run.timeline.get("step") or (run.steps[-1]["step"] if run.steps else 0) or 0)
        words = [*_bubbles(run.timeline, ranks), *_length(run, step, spans)]
        longest = max(map(_makespan, spans.values()))
        pictures = [_picture(key, name, spans[key], ranks, longest) for key, name in _PICTURES.items()]
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return section(
            "Pipeline timeline",
            f"<p>timeline.json cannot be drawn: {escape(type(error).__name__)}, {escape(str(error))}.</p>",
        )
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in words)
    return section(f"Pipeline timeline of step {step:,}", sentences, *pictures)


def _spans(records: Sequence[Sequence[Any]], num_ranks: int) -> list[Span]:
    """Return `spans_of` from 0 on. Raises ValueError where a record is wrong, or a time is not finite."""
    spans = spans_of(records, num_ranks)
    first = min((span.start for span in spans), default=0.0)
    for span in spans:
        if not span.start - first < float("inf") > span.stop:
            raise ValueError(f"the time of action {span.action} of rank {span.rank} is not finite")
    return [Span(span.rank, span.action, span.start - first, span.stop - first) for span in spans]


def _makespan(spans: Sequence[Span]) -> float:
    return max(span.stop for span in spans)


def _bubbles(timeline: Mapping[str, Any], ranks: int) -> Iterator[str]:
    shares = ", ".join(f"{number(timeline.get(f'bubble_{key}'), '.1%')} {key}" for key in _PICTURES)
    many = counted(ranks, "pipeline rank")
    yield f"{many}. Bubble, the share of the step in which a rank waits, averaged over ranks: {shares}."


def _length(run: Run, step: int, spans: Mapping[str, Sequence[Span]]) -> Iterator[str]:
    """Yield how the step compares with the others, and what it spent its time on."""
    times = dict(finite_points(run.steps, "step_time_ms"))
    mine = times.get(float(step))
    pipeline, simulated = (_makespan(spans[key]) for key in _PICTURES)
    if mine is not None and len(times) > 1:
        usual = statistics.median(times.values())
        faster = sum(each < mine for each in times.values()) / len(times)
        how = f"{abs(mine / usual - 1):.1%} {'longer' if mine >= usual else 'shorter'} than the median step"
        yield (
            f"It is the last step that ran, not a typical one: it took {mine:,.4g} ms, {how} ({usual:,.4g} ms); "
            f"{faster:.0%} of the steps were faster. Its pipeline took {pipeline:,.4g} ms of that; "
            f"{max(0.0, mine - pipeline):,.3g} ms are for gradients over dp, the optimizer and logging."
        )
    late, over = max(
        ((span, span.stop - span.start - usual) for span, usual in _usual(spans["measured"])), key=lambda item: item[1]
    )
    if pipeline > simulated:
        yield (
            f"The pipeline would take {simulated:,.4g} ms if every action took the median time of its kind and "
            f"messages no time: {pipeline - simulated:,.3g} ms are of slower actions and of messages. The slowest, "
            f"{KINDS[late.action.kind].words} of microbatch {late.action.microbatch} on rank {late.rank}, took "
            f"{over:,.3g} ms more than its kind's median."
        )


def _usual(spans: Sequence[Span]) -> Iterator[tuple[Span, float]]:
    """Yield each span of a compute action with the median time of its kind and stage."""
    times: dict[tuple[ActionKind, int], list[float]] = {}
    for span in spans:
        times.setdefault((span.action.kind, span.action.stage), []).append(span.stop - span.start)
    medians = {key: statistics.median(each) for key, each in times.items()}
    for span in spans:
        if span.action.is_compute:
            yield span, medians[span.action.kind, span.action.stage]


def _picture(key: str, name: str, spans: Sequence[Span], ranks: int, longest: float) -> str:
    held = sorted({(span.rank, span.action.stage) for span in spans if span.action.is_compute})
    kinds: dict[tuple[ActionKind, int], int] = {}  # and their places in the list of what boxes look like
    looks, records = [], []
    for span in spans:
        row = KINDS[span.action.kind]
        chunk = sum(rank == span.rank and other < span.action.stage for rank, other in held)
        shade = min(chunk, len(row.shades) - 1)
        if (span.action.kind, shade) not in kinds:
            kinds[span.action.kind, shade] = len(kinds)
            looks.append({
                "words": row.words, "color": row.shades[shade], "ink": _DARK if shade else _LIGHT,
                "wire": not span.action.is_compute, "label": row.words + (f", chunk {shade}" if shade else ""),
            })  # fmt: skip
        place = kinds[span.action.kind, shade]
        records.append([span.rank, round(span.start, 3), round(span.stop, 3), place, str(span.action.microbatch)])
    data = {
        "kind": "timeline", "x": ["ms"], "log": "", "ranks": ranks, "span": [0, longest], "spans": records,
        "kinds": looks, "height": 60 + _ROW_HEIGHT * ranks,
    }  # fmt: skip
    rows = [
        (str(span.rank), str(span.action), f"{span.start:.4g}", f"{span.stop - span.start:.4g}")
        for span in spans[:_MOST_ROWS]
    ]
    return figure(f"timeline-{key}", name, data, grid(("rank", "action", "begins at ms", "takes ms"), rows))
