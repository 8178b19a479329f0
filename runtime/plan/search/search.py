"""Search for layouts: all that the spec's rules allow and that fit, fastest first, and why the others lost. No torch.

Every layout of the GPUs is timed in one array; the fastest are then built as specs, so that each that is returned obeys
every rule, and planned exactly: memory to the byte where the layer is in the table, time by the schedule's own list.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import numpy as np

from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.plan.cases import Array, Case, Cases
from trimaran.runtime.plan.forecast import CONTEXT_BYTES, Plan, Setting, case_of, plan
from trimaran.runtime.plan.time.calibrations import calibration_for, shipped
from trimaran.runtime.plan.time.step import parameters_of_rank, step_time
from trimaran.runtime.spec import RunSpec, SpecError, parse_spec

FIELDS: Final = {
    "parallel.tp": "tp", "parallel.pp": "pp", "parallel.dp": "dp", "parallel.ep": "ep",
    "parallel.virtual_stages": "virtual_stages", "parallel.schedule": "schedule",
    "parallel.sequence_parallel": "sequence_parallel", "train.micro_batch_size": "microbatch", "zero.stage": "zero",
    "train.recompute": "recompute",
}  # fmt: skip
"""What is searched: field of the spec -> name in a layout."""
_SLACK: Final = 1.15  # how far above the chip's memory an estimate may lie for the exact count to be made
_MOST_PLANNED: Final = 60  # layouts of which specs are built, at most
_MICROBATCHES: Final = (1, 2, 4, 8, 16, 32)
_VIRTUAL: Final = (1, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out."""

    tp: int
    pp: int
    dp: int
    ep: int
    virtual_stages: int
    schedule: str
    sequence_parallel: bool
    microbatch: int
    zero: int
    recompute: str

    def content(self) -> dict[str, dict[str, object]]:
        """Return the fields of a spec, by section."""
        found: dict[str, dict[str, object]] = {"parallel": {}, "train": {}, "zero": {}}
        for path, name in FIELDS.items():
            section, _, field = path.partition(".")
            found[section][field] = getattr(self, name)
        return found


@dataclass(frozen=True)
class Found:
    """A layout that fits.

    Attributes:
        lost: what it spends more than the fastest on, in words; "" for the fastest.
    """

    layout: Layout
    spec: RunSpec
    plan: Plan
    lost: str


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        found: the fastest that fit, in order.
        tried: layouts of the GPUs that were timed.
        fitting: those that an estimate of memory lets fit.
    """

    found: list[Found]
    tried: int
    fitting: int


def search(
    spec: RunSpec, setting: Setting, *, gpus: int, headroom: float, fixed: Mapping[str, object], most: int
) -> Search:
    """Return the fastest layouts of `gpus` GPUs that fit.

    Args:
        headroom: share of the chip's memory that must stay free.
        fixed: values of fields, by name of `FIELDS`.
        most: layouts to return.
    Raises:
        ValueError: no layout obeys the rules, or none fits; the sentence says which and how far off the closest is.
    """
    layouts = list(layouts_of(spec, gpus, setting.gpus_per_node, fixed))
    if not layouts:
        raise ValueError(
            f"no layout of {gpus} GPUs: tp x pp x dp must be {gpus}, tp must divide the heads "
            f"({spec.transformer.num_heads}) and at most the {setting.gpus_per_node} GPUs of a node, pp at most the "
            f"layers, and micro_batch_size x dp must divide the batch ({spec.train.global_batch_size}); change --gpus, "
            "--fix or train.global_batch_size"
        )
    base = case_of(_spec_of(spec, None), setting)
    cases = Cases.of(_case(base, layout, spec) for layout in layouts)
    calibration, _ = calibration_for(shipped(), setting.software, setting.chip.name, "bfloat16")
    seconds = step_time(cases, calibration.values()).total
    room = setting.chip.memory_bytes * (1 - headroom)
    needed = estimated_bytes(cases)
    fits = needed <= room * _SLACK
    if not fits.any():
        _refuse(layouts[int(np.argmin(needed))], float(needed.min()) - room, setting)
    order = [int(index) for index in np.argsort(seconds, kind="stable") if fits[index]]
    found, closest = _planned([layouts[index] for index in order], spec, setting, room, most)
    if not found:
        layout, missing = closest or (layouts[order[0]], float(needed[order[0]]) - room)
        _refuse(layout, missing, setting)
    return Search([replace(each, lost=_why(each, found[0])) for each in found], len(layouts), int(fits.sum()))


def layouts_of(spec: RunSpec, gpus: int, gpus_per_node: int, fixed: Mapping[str, object]) -> Iterator[Layout]:
    """Yield the layouts of so many GPUs, with the values that are fixed."""
    model, batch = spec.transformer, spec.train.global_batch_size

    def values(name: str, every: Sequence[Any]) -> Sequence[Any]:
        return [fixed[name]] if name in fixed else every

    tps = [tp for tp in _divisors(gpus) if tp <= gpus_per_node and model.num_heads % tp == 0]
    pps = [pp for pp in _divisors(gpus) if pp <= model.num_layers]
    recomputes = values("recompute", ["none", "selective", "full"])
    for tp, pp in product(values("tp", tps), values("pp", pps)):
        if gpus % (tp * pp):
            continue
        dp = gpus // (tp * pp)
        eps = [ep for ep in _divisors(dp) if model.num_experts and model.num_experts % (ep * tp) == 0] or [1]
        microbatches = [each for each in _MICROBATCHES if batch % (each * dp) == 0]
        if dp not in values("dp", [dp]):
            continue
        stages = [v for v in _VIRTUAL if v * pp <= model.num_layers] if pp > 1 else [1]
        for virtual, microbatch in product(values("virtual_stages", stages), values("microbatch", microbatches)):
            if batch % (microbatch * dp):
                continue
            for schedule in values("schedule", ["1f1b"] if virtual == 1 else ["interleaved_1f1b"]):
                if not _runs(schedule, pp, virtual, batch // (microbatch * dp)):
                    continue
                for zero, again, ep in product(values("zero", [0, 1] if pp > 1 else [0, 1, 2, 3]), recomputes, eps):
                    for parallel in values("sequence_parallel", [True] if tp > 1 else [False]):
                        yield Layout(tp, pp, dp, ep, virtual, schedule, parallel, microbatch, zero, again)


def _runs(schedule: str, pp: int, virtual: int, microbatches: int) -> bool:
    row = next((row for name, row in SCHEDULES.items() if name == schedule), None)
    if row is None or row.virtual_stages not in (None, virtual):
        return False
    return microbatches >= row.fewest_microbatches(pp) and not (row.in_groups and virtual > 1 and microbatches % pp)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _case(base: Case, layout: Layout, spec: RunSpec) -> Case:
    share = -(-int(base.layers) // layout.pp)
    every = int(layout.recompute) if layout.recompute.isdigit() else {"full": 1}.get(layout.recompute, 0)
    return replace(
        base, tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.ep, virtual_stages=layout.virtual_stages,
        sequence_parallel=float(layout.sequence_parallel), microbatch=layout.microbatch, zero=layout.zero,
        recompute=1 / every if every else 0.0, selective=float(layout.recompute == "selective"), most_layers=share,
        first_layers=share, last_layers=max(0.0, base.layers - share * (layout.pp - 1)),
        batch=spec.train.global_batch_size,
    )  # fmt: skip


def estimated_bytes(c: Cases) -> Array:
    """Return about what the fullest rank of each layout holds, in 16 bits; the exact count is made of the fastest."""
    held, group = parameters_of_rank(c), c.dp
    whole = ((3, 2.0), (2, 4.0), (1, 12.0))  # from which stage on it is sharded, and bytes a parameter
    state = held * sum(np.where(c.zero >= stage, size / group, size) for stage, size in whole)
    tokens = c.microbatch * c.seq
    cut = np.where(c.sequence_parallel > 0, c.tp, 1.0)
    stream = np.where(c.selective > 0, 4.0, 8.0) * c.hidden / cut
    heads = 2.0 * (2 * c.heads + 3 * np.maximum(c.kv_heads, np.minimum(c.tp, c.heads))) * c.head_dim / c.tp
    inner = 2.0 * (1 + c.gated + np.where(c.selective > 0, 0.0, 1.0)) * c.ffn * c.experts_per_token / c.tp
    layer = tokens * (stream + heads + inner)
    kept = np.where(c.recompute > 0, c.recompute * tokens * 4.0 * c.hidden / cut + (1 - c.recompute) * layer, layer)
    most = np.where(c.virtual_stages > 1, c.pp * (1 + (c.pp - 1) / (c.pp * c.virtual_stages)), c.pp)
    flight = np.where(c.pp > 1, np.minimum(most, c.microbatches), 1.0)
    return np.asarray(state + flight * c.most_layers * kept + np.where(c.recompute > 0, layer, 0.0) + CONTEXT_BYTES)


def _spec_of(spec: RunSpec, layout: Layout | None) -> RunSpec:
    content = spec.model_dump(mode="json")
    content["parallel"] |= {"layers_per_stage": None, "schedule_file": None}
    if layout is None:
        content["parallel"] |= {"tp": 1, "pp": 1, "dp": 1, "ep": 1, "virtual_stages": 1, "schedule": "1f1b"}
        content["parallel"]["sequence_parallel"] = False
        content["train"]["micro_batch_size"] = 1
        content["zero"] |= {"stage": 0, "shard_size": None}
    else:
        content["zero"]["shard_size"] = None
        for section, values in layout.content().items():
            content[section] |= values
    return parse_spec(content)


def _planned(
    layouts: Sequence[Layout], spec: RunSpec, setting: Setting, room: float, most: int
) -> tuple[list[Found], tuple[Layout, float] | None]:
    """Return those that obey every rule and fit, fastest first, and the closest of those that don't fit."""
    found: list[Found] = []
    closest: tuple[Layout, float] | None = None
    for layout in layouts[:_MOST_PLANNED]:
        try:
            own = _spec_of(spec, layout)
            made = plan(own, setting)
        except SpecError:
            continue
        missing = made.total(made.fullest) - room
        if missing <= 0:
            found.append(Found(layout, own, made, ""))
        elif closest is None or missing < closest[1]:
            closest = layout, missing
        if len(found) >= 2 * most:
            break
    return sorted(found, key=lambda each: each.plan.seconds)[:most], closest


def _why(each: Found, best: Found) -> str:
    """Return the two parts of a step that cost most more than in the fastest layout."""
    if each.layout == best.layout:
        return ""
    more = {name: each.plan.parts.get(name, 0.0) - value for name, value in best.plan.parts.items()}
    largest = sorted(more.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} +{value / best.plan.seconds:.1%}" for name, value in largest if value > 0)


def _refuse(layout: Layout, missing: float, setting: Setting) -> None:
    raise ValueError(
        f"no layout fits {setting.chip.name}: the closest, tp {layout.tp} pp {layout.pp} dp {layout.dp} "
        f"micro_batch_size {layout.microbatch} zero {layout.zero} recompute {layout.recompute}, needs "
        f"{missing / 2**30:.1f} GiB more; give more --gpus, a chip with more memory, or a lower --headroom"
    )
