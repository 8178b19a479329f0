"""Search for layouts: all that the spec's rules allow and that fit, fastest first, and why the others lost. No torch.

Every layout of the GPUs is timed in one array; the fastest are then built as specs, so that each that is returned obeys
every rule, and planned exactly: memory to the byte where the layer is in the table, time by the schedule's own list.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.chips import CHIPS
from trimaran.runtime.plan.forecast import Plan, Setting, plan
from trimaran.runtime.plan.memory.state import check_native
from trimaran.runtime.plan.search.estimate import cases_of, estimated_bytes
from trimaran.runtime.plan.search.fewest import counts_up_to, fewest_gpus, fullest_bytes, largest_microbatch
from trimaran.runtime.plan.search.layouts import Layout, Sieve, layouts_of, spec_of
from trimaran.runtime.plan.search.neighbours import Neighbour, neighbours
from trimaran.runtime.plan.time.calibrations import calibration_for, shipped
from trimaran.runtime.plan.time.step import step_time
from trimaran.runtime.spec import RunSpec, SpecError

_SLACK: Final = 1.3  # how far above the room an estimate may lie for the exact count to be made
_MOST_BUILT: Final = 300  # specs, at most
_CLOSEST: Final = 12  # layouts that are counted to find the one that lacks least
TRAFFIC: Final = (
    "tensor-parallel", "context-parallel", "experts' exchange", "sharded state", "transfers", "data-parallel",
)  # fmt: skip
_CAUSES: Final = {
    "bubble": ("bubble", "head and loss"), "traffic": TRAFFIC, "host": ("host",),
    "arithmetic": ("products", "attention", "memory-bound", "optimizer"),
}  # fmt: skip
"""What a layout may lose by -> parts of a step."""


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
        timed: about, seconds of a step of each layout that fits, fastest first.
        beside: what is one step away from the fastest, with what it lost by.
        largest_microbatch: with which the fastest fits, all else the same.
        fewest: a layout of the fewest GPUs that hold the run.
    """

    found: list[Found]
    tried: int
    fitting: int
    timed: list[tuple[Layout, float]] = field(repr=False)
    beside: list[tuple[Neighbour, str]]
    largest_microbatch: int
    fewest: Layout


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
    check_native(spec)
    sieve = Sieve()
    layouts = list(layouts_of(spec, gpus, setting.gpus_per_node, fixed, sieve))
    if not layouts:
        raise ValueError(f"no layout of {gpus} GPUs is left: {sieve.last()}; change --gpus, --fix or the spec")
    cases = cases_of(spec, setting, layouts)
    calibration, _ = calibration_for(shipped(), setting.software, setting.chip.name, "bfloat16")
    seconds = step_time(cases, calibration.values()).total
    room = setting.chip.memory_bytes * (1 - headroom)
    needed = estimated_bytes(cases, spec.precision.dtype)
    fits = needed <= room * _SLACK
    order = [index for index in np.argsort(seconds, kind="stable") if fits[index]]
    rules = _Rules(spec)
    found = _planned([layouts[index] for index in order], rules, setting, room, most)
    if not found:
        # The fastest may all hold a little more than was estimated: those that hold least are next.
        least = [layouts[index] for index in np.argsort(needed, kind="stable")]
        found = _planned(least, rules, setting, room, most)
    if not found:
        _refuse(least, rules, setting, room, fixed)
    found, beside = _descended(found, spec, setting, room, fixed)
    best = found[0]
    counts = counts_up_to(gpus - 1, setting.gpus_per_node)
    return Search(
        found=[replace(each, lost=why(each.plan, best.plan)) for each in found[:most]],
        tried=len(layouts),
        fitting=len(order),
        timed=[(layouts[index], float(seconds[index])) for index in order],
        beside=[(each, _verdict(each, best.plan)) for each in beside],
        largest_microbatch=largest_microbatch(spec, best.layout, room),
        fewest=fewest_gpus(spec, setting, room, fixed, counts) or best.layout,
    )


class _Rules:
    """Builds specs of layouts. Of layouts that differ in ZeRO stage and recomputation alone one that breaks a rule is
    enough: those two have no rule with the others.

    Attributes:
        broken: by sentence, the layouts that broke a rule.
        built: specs that were built, of layouts that obey every rule or not.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.broken: Counter[str] = Counter()
        self.built = 0
        self._refused: set[Layout] = set()

    def spec_of(self, layout: Layout) -> RunSpec | None:
        """Return the spec with a layout; None where it breaks a rule."""
        same = replace(layout, zero=0, recompute="none")
        if same in self._refused:
            return None
        self.built += 1
        try:
            return spec_of(self.spec, layout)
        except SpecError as error:
            self.broken[str(error.errors[0])] += 1
            self._refused.add(same)
            return None


def _planned(layouts: Sequence[Layout], rules: _Rules, setting: Setting, room: float, most: int) -> list[Found]:
    """Return the fastest that obey every rule and fit, of those that come first."""
    found: list[Found] = []
    built = rules.built
    for layout in layouts:
        own = rules.spec_of(layout)
        if own is not None and fullest_bytes(own) <= room:
            found.append(Found(layout, own, plan(own, setting), ""))
        if len(found) >= 2 * most or rules.built - built >= _MOST_BUILT:
            break
    return sorted(found, key=lambda each: each.plan.seconds)


def _descended(
    found: list[Found], spec: RunSpec, setting: Setting, room: float, fixed: Mapping[str, object]
) -> tuple[list[Found], list[Neighbour]]:
    """Go on to the fastest neighbour for as long as one is faster; return what fits, in order, and who was beside.

    So the first is faster than everything one step away, with schedules that are not in the array too.
    """
    while True:
        best, known = found[0], {each.layout for each in found}
        beside = neighbours(spec, setting, best.layout, room, fixed)
        new = [Found(each.layout, each.spec, each.plan, "") for each in beside if each.spec and each.plan]
        found = sorted([*found, *(each for each in new if each.layout not in known)], key=lambda own: own.plan.seconds)
        if found[0].layout == best.layout:
            return found, beside


def _verdict(own: Neighbour, best: Plan) -> str:
    if own.rule:
        return f"rule: {own.rule}"
    if own.plan is None:
        return f"memory: {own.missing / 2**30:.1f} GiB too many"
    slower = own.plan.seconds / best.seconds - 1
    return f"{slower:+.1%}: {why(own.plan, best)}" if slower >= 5e-4 else "as fast"


def why(own: Plan, best: Plan) -> str:
    """Return what a layout spends more on than the best one: bubble, traffic, host or arithmetic, with its share.

    Shares are of the best one's step; what is below 0.1% is left out.
    """
    more = {name: own.parts.get(name, 0.0) - value for name, value in best.parts.items()}
    lost = []
    for cause, parts in _CAUSES.items():
        whole = sum(more.get(part, 0.0) for part in parts) / best.seconds
        if whole >= 1e-3:
            most = max(parts, key=lambda part: more.get(part, 0.0))
            lost.append((whole, f"{cause} +{whole:.1%}" + (f" ({most})" if len(parts) > 1 and most != cause else "")))
    return ", ".join(text for _, text in sorted(lost, reverse=True)[:2])


def _refuse(
    layouts: Sequence[Layout], rules: _Rules, setting: Setting, room: float, fixed: Mapping[str, object]
) -> None:
    """Raise ValueError: no layout fits, or every one breaks a rule. The first ones hold about least."""
    missing: list[tuple[float, Layout]] = []
    built = rules.built
    for layout in layouts:
        own = rules.spec_of(layout)
        if own is not None:
            missing.append((fullest_bytes(own) - room, layout))
        if len(missing) == _CLOSEST or rules.built - built >= _MOST_BUILT:
            break
    gpus, chip = layouts[0].gpus, setting.chip
    if not missing:
        raise ValueError(f"every layout of {gpus} GPUs breaks a rule: {rules.broken.most_common(1)[0][0]}")
    lacks, closest = min(missing, key=lambda pair: pair[0])
    larger = fewest_gpus(rules.spec, setting, room, fixed, (gpus * 2**power for power in range(1, 8)))
    share = room / chip.memory_bytes
    fitting = (each for each in CHIPS if each.memory_bytes * share >= room + lacks)
    others = [each for each in fitting if each.has_bfloat16 or rules.spec.precision.dtype != "bfloat16"]
    would = [f"{larger.gpus} GPUs ({larger})"] if larger else []
    would += [f"{gpus} {min(others, key=lambda each: each.memory_bytes).name}"] if others else []
    raise ValueError(
        f"no layout fits {gpus} {chip.name}: the closest, {closest}, lacks {lacks / 2**30:.1f} GiB; "
        + (f"what would fit: {', or '.join(would)}" if would else "lower train.seq_len or take a smaller model")
    )
