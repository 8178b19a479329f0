"""Whether a search finds the layouts that nanotron's authors found best: of each of their 18 cells by time and memory.

They ran every layout of a model on so many GPUs and printed the fastest alone. Here every tp (up to 32), pp (up to 16),
microbatch and ZeRO stage (0, 1) that divides is timed, and those that fit the chip are ranked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Case, Cases, layers_by_cost
from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.memory.habits import habits_of, rank_bytes
from trimaran.runtime.plan.published.tables import PublishedRun
from trimaran.runtime.plan.time.constants import Constants
from trimaran.runtime.plan.time.step import step_time

_TP: Final = (1, 2, 4, 8, 16, 32)
_PP: Final = (1, 2, 4, 8, 16)
_MICROBATCHES: Final = (1, 2, 4, 8, 16, 32, 64)


def places_of_winners(runs: Sequence[PublishedRun], constants: Constants) -> list[tuple[int, int]]:
    """Return for each run of nanotron its place in the search, 1 the first: of its grid, and of its whole layout.

    A grid is tp x pp x dp, each with its best microbatch and stage; a layout has its microbatch too.
    """
    return [_places(run, constants) for run in runs]


def _places(run: PublishedRun, constants: Constants) -> tuple[int, int]:
    tried = list(_tried(run.cases[0], run.gpus))
    cases, habits = Cases.of(tried), habits_of(run.stack)
    assert habits is not None, run.stack
    held = np.sum(list(rank_bytes(cases, habits).values()), axis=0)
    room = chip_named(run.chip).memory_bytes
    order = np.argsort(step_time(cases, constants).total, kind="stable")
    places = []
    for key in (_grid, _layout):
        own = key(run.cases[0])
        # the winner ran, so it fits whatever is planned
        ranked = dict.fromkeys(key(tried[i]) for i in order if held[i] <= room or key(tried[i]) == own)
        places.append(1 + list(ranked).index(own))
    return places[0], places[1]


def _grid(case: Case) -> tuple[float, ...]:
    return case.tp, case.pp, case.dp


def _layout(case: Case) -> tuple[float, ...]:
    return case.tp, case.pp, case.dp, case.microbatch


def _tried(case: Case, gpus: int) -> Iterator[Case]:
    cost = 4 * case.hidden**2 + 3 * case.ffn * case.hidden
    for tp, pp, microbatch in product(_TP, _PP, _MICROBATCHES):
        dp = gpus // (tp * pp)
        if case.heads % tp or gpus % (tp * pp) or pp > case.layers or case.batch % (microbatch * dp):
            continue
        shares = layers_by_cost(int(case.layers), pp, cost, case.vocab * case.hidden)
        for zero in (0, 1) if dp > 1 else (0,):
            yield replace(
                case, tp=tp, pp=pp, dp=dp, microbatch=microbatch, zero=zero, sequence_parallel=float(tp > 1),
                first_layers=shares[0], last_layers=shares[-1], most_layers=max(shares),
            )  # fmt: skip
