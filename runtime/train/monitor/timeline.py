"""The pipeline timeline of a step as measured, with the simulation of the same schedule at the measured costs."""

import json
import statistics
from dataclasses import replace
from typing import Any

from trimaran.runtime.pipeline.action import Action, ActionKind
from trimaran.runtime.pipeline.simulate import Costs, Span, simulate
from trimaran.runtime.train.train_context import TrainContext

_DIGITS = 4  # decimal places of milliseconds


def record_timeline(train_context: TrainContext) -> dict[str, Any]:
    """Return timeline.json's content for the last step, from the ranks with dp = cp = tp = 0.

    Collective over the world.
    """
    coordinates = train_context.mesh.coordinates
    mine = not any(coordinates[axis] for axis in ("dp", "cp", "tp"))
    rows = (
        [[str(action), start * 1e3, stop * 1e3] for action, start, stop in train_context.executor.spans] if mine else []
    )
    texts = train_context.mesh.gather_text(json.dumps([coordinates["pp"], rows]))
    spans = [
        Span(rank, Action.parse(action), start, stop)
        for rank, ranks_rows in map(json.loads, texts)
        for action, start, stop in ranks_rows
    ]
    simulation = simulate(train_context.schedule, _measured_costs(spans, train_context.spec.num_stages))
    return {
        "num_ranks": train_context.mesh.pp.size,
        "measured": _rows(spans),
        "simulated": _rows(span for span in simulation.spans if span.action.kind.is_compute),
        "bubble_measured": _bubble(spans, train_context.mesh.pp.size),
        "bubble_simulated": simulation.bubble,
    }


def _measured_costs(spans: list[Span], num_stages: int) -> Costs:
    """The median of each kind and stage; B, or I and W, is what the stage ran."""

    def median_ms(kind: ActionKind, stage: int) -> float:
        found = [span.stop - span.start for span in spans if (span.action.kind, span.action.stage) == (kind, stage)]
        return statistics.median(found) if found else 0.0

    forward, backward, inputs, weights = (
        [median_ms(kind, stage) for stage in range(num_stages)]
        for kind in (ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W)
    )
    costs = Costs.of_stages(forward, backward, weights)
    return replace(costs, times={**costs.times, ActionKind.I: inputs})


def _bubble(spans: list[Span], num_ranks: int) -> float:
    makespan = max(span.stop for span in spans) - min(span.start for span in spans)
    return 1.0 - sum(span.stop - span.start for span in spans) / (num_ranks * makespan)


def _rows(spans: Any) -> list[list[Any]]:
    return [[span.rank, str(span.action), round(span.start, _DIGITS), round(span.stop, _DIGITS)] for span in spans]
