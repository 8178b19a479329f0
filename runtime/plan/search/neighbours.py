"""The layouts one step away from another: each with what it loses by, and which of them is faster. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trimaran.models.config import TransformerConfig
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.plan.forecast import Plan, Setting, plan
from trimaran.runtime.plan.search.fewest import fullest_bytes
from trimaran.runtime.plan.search.layouts import Layout, layout_of, spec_of
from trimaran.runtime.spec import RunSpec, SpecError


@dataclass(frozen=True)
class Neighbour:
    """A layout one step away.

    Attributes:
        change: what differs, in words.
        missing: bytes that it lacks; below 0 where it fits, NaN where it breaks a rule.
        plan: None where it breaks a rule or does not fit.
        rule: that it breaks; "" for none.
    """

    change: str
    layout: Layout
    spec: RunSpec | None
    missing: float
    plan: Plan | None
    rule: str


def neighbours(
    spec: RunSpec, setting: Setting, layout: Layout, room: float, fixed: Mapping[str, object]
) -> list[Neighbour]:
    """Return the layouts of as many GPUs that differ in one choice, but for what is fixed.

    Args:
        room: bytes that a rank may hold.
    """
    made = []
    for other in _near(layout, spec, setting.gpus_per_node):
        changed = [name for name in vars(layout) if getattr(layout, name) != getattr(other, name)]
        if any(name in fixed for name in changed):
            continue
        change = ", ".join(f"{_words(name)} {getattr(other, name)}" for name in changed)
        try:
            own = spec_of(spec, other)
        except SpecError as error:
            made.append(Neighbour(change, other, None, float("nan"), None, str(error.errors[0])))
            continue
        missing = fullest_bytes(own) - room
        made.append(Neighbour(change, other, own, missing, plan(own, setting) if missing <= 0 else None, ""))
    return made


def _words(name: str) -> str:
    return {"microbatch": "micro_batch_size", "zero": "zero.stage"}.get(name, name)


def _near(layout: Layout, spec: RunSpec, gpus_per_node: int) -> Iterator[Layout]:
    yield from _grids(layout, spec.transformer, gpus_per_node)
    batch = spec.train.global_batch_size // layout.dp
    sizes = [each for each in range(1, min(batch, 64) + 1) if batch % each == 0]
    for microbatch in _beside(sizes, layout.microbatch):
        yield replace(layout, microbatch=microbatch)
    if layout.dp > 1:
        for zero in _beside([0, 1, 2, 3], layout.zero):
            yield replace(layout, zero=zero)
    for recompute in ("none", "selective", "full"):
        if recompute != layout.recompute:
            yield replace(layout, recompute=recompute)
    if layout.tp > 1 and spec.train.seq_len % layout.tp == 0:
        yield replace(layout, sequence_parallel=not layout.sequence_parallel)
    for ep in (layout.ep * 2, layout.ep // 2):
        if ep and layout.dp % ep == 0 and spec.transformer.num_experts:
            yield replace(layout, ep=ep)


def _grids(layout: Layout, model: TransformerConfig, gpus_per_node: int) -> Iterator[Layout]:
    """Yield layouts with twice or half the tp or pp, dp or the other one making up for it; then other schedules."""
    for name, other in (("tp", "dp"), ("pp", "dp"), ("tp", "pp")):
        own, rest = getattr(layout, name), getattr(layout, other)
        for mine, theirs in ((own * 2, rest / 2), (own / 2, rest * 2)):
            if mine == int(mine) and theirs == int(theirs):
                sizes: dict[str, Any] = {name: int(mine), other: int(theirs)}
                found = replace(layout, **sizes)
                if found.tp > gpus_per_node or model.num_heads % found.tp:
                    continue
                yield _piped(found, layout.virtual_stages, model.num_layers)
    if layout.pp > 1:
        for virtual in (layout.virtual_stages - 1, layout.virtual_stages + 1):
            if 1 <= virtual <= model.num_layers // layout.pp:
                yield _piped(layout, virtual, model.num_layers)
        for schedule, row in SCHEDULES.items():
            if row.splits_backward and row.virtual_stages == layout.virtual_stages and schedule != layout.schedule:
                yield replace(layout, schedule=schedule)


def _piped(layout: Layout, virtual: int, layers: int) -> Layout:
    """Return the layout with so many virtual stages, or as many as there are layers for, under a schedule of theirs."""
    stages = 1 if layout.pp == 1 else max(1, min(virtual, layers // layout.pp))
    same = stages == layout.virtual_stages and layout.pp > 1
    schedule = layout.schedule if same else "1f1b" if stages == 1 else "interleaved_1f1b"
    # nothing is cut where tp is 1
    return replace(
        layout, virtual_stages=stages, schedule=schedule, sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        zero=layout.zero if layout.dp > 1 else 0,
    )  # fmt: skip


def _beside(values: list[int], own: int) -> list[int]:
    below, above = [each for each in values if each < own], [each for each in values if each > own]
    return [*below[-1:], *above[:1]]


def cheapest_change(spec: RunSpec, setting: Setting) -> Neighbour | None:
    """Return the fastest layout one step from the spec's own that fits the chip; None where none of them does."""
    room = float(setting.chip.memory_bytes)
    fitting = [each for each in neighbours(spec, setting, layout_of(spec), room, {}) if each.plan is not None]
    return min(fitting, key=lambda each: each.plan.seconds if each.plan else 0.0, default=None)
