"""The fewest GPUs that hold a run, and the largest microbatch that fits. No torch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.forecast import Setting
from trimaran.runtime.plan.memory.ranks import memory_of
from trimaran.runtime.plan.search.estimate import cases_of, estimated_bytes
from trimaran.runtime.plan.search.layouts import Layout, layouts_of, spec_of
from trimaran.runtime.spec import RunSpec, SpecError

_SLACK: Final = 1.3  # how far above the room an estimate may lie for the exact count to be made
_MOST_COUNTED: Final = 6  # of one number of GPUs
_SMALLEST: Final[Mapping[str, object]] = {"microbatch": 1, "virtual_stages": 1, "recompute": "full"}


def fullest_bytes(spec: RunSpec) -> float:
    """Return the bytes of the pipeline rank that holds most."""
    return max(sum(parts.values()) for parts in memory_of(spec))


def fewest_gpus(
    spec: RunSpec, setting: Setting, room: float, fixed: Mapping[str, object], counts: Iterable[int]
) -> Layout | None:
    """Return a layout of the first of these numbers of GPUs that holds the run; None: none of them does.

    Args:
        room: bytes that a rank may hold.
        fixed: values of fields; what is not fixed is chosen to hold least.
        counts: ascending.
    """
    for gpus in counts:
        layouts = list(layouts_of(spec, gpus, setting.gpus_per_node, {**_SMALLEST, **fixed}))
        if not layouts:
            continue
        needed = estimated_bytes(cases_of(spec, setting, layouts), spec.precision.dtype)
        least = [int(index) for index in np.argsort(needed, kind="stable")[:_MOST_COUNTED]]
        for layout in (layouts[index] for index in least if needed[index] <= room * _SLACK):
            try:
                if fullest_bytes(spec_of(spec, layout)) <= room:
                    return layout
            except SpecError:
                continue
    return None


def counts_up_to(most: int, gpus_per_node: int) -> Iterator[int]:
    """Yield parts of a node that share it evenly, then whole nodes."""
    for gpus in range(1, most + 1):
        if gpus_per_node % gpus == 0 or gpus % gpus_per_node == 0:
            yield gpus


def largest_microbatch(spec: RunSpec, layout: Layout, room: float) -> int:
    """Return the largest microbatch with which a layout fits, all else the same; its own where no larger one does.

    A larger one is looked for only up to where one does not fit, for memory rises with it.
    """
    largest, batch = layout.microbatch, spec.train.global_batch_size // layout.dp
    for microbatch in (each for each in range(largest + 1, batch + 1) if batch % each == 0):
        try:
            own = spec_of(spec, replace(layout, microbatch=microbatch))
        except SpecError:
            continue
        if fullest_bytes(own) > room:
            break
        largest = microbatch
    return largest
