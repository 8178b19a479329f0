"""Which trials are ended early: pure functions of the held-out losses of the trial and of the others. No torch."""

import math
import statistics
import zlib
from collections.abc import Iterator, Sequence

from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import PruneSection

STARTUP_TRIALS = 5
"""Trials that must be complete before median ends one."""


def step_of_end(prune: PruneSection, trial: Trial, others: Sequence[Trial], num_steps: int) -> int | None:
    """Return the step of the first evaluation at which a trial is ended, None where it goes on.

    Args:
        others: of the same part of the study, with their held-out losses so far.
        num_steps: of the trial; its last evaluation never ends it.
    """
    judges = {"none": lambda *_: iter(()), "median": _by_median, "hyperband": _by_hyperband}
    ends: Iterator[int] = judges[prune.method](prune, trial, others, num_steps)
    return next((step for step in ends if step < num_steps), None)


def _by_median(prune: PruneSection, trial: Trial, others: Sequence[Trial], num_steps: int) -> Iterator[int]:
    """Yield the evaluations at which the best loss so far is above the median of the complete trials at that step.

    The median stopping rule of Golovin et al. (Vizier) 2017, section 3.2.2.
    """
    complete = [
        {point.step: point.held_out_loss for point in each.curve} for each in others if each.state == "complete"
    ]
    if len(complete) < STARTUP_TRIALS:
        return
    best = math.inf
    for point in trial.curve:
        best = min(best, point.held_out_loss)
        there = [losses[point.step] for losses in complete if point.step in losses]
        if point.step >= prune.first_step and there and best > statistics.median(there):
            yield point.step


def _by_hyperband(prune: PruneSection, trial: Trial, others: Sequence[Trial], num_steps: int) -> Iterator[int]:
    """Yield the evaluations at which a trial is not among the best of its bracket.

    Hyperband (Li et al. 2018) over asynchronous successive halving (Li et al. 2020): bracket b looks at the steps
    first_step * factor ** (b + 0, 1, ...), and the best of every `factor` trials there go on.
    """
    count = _num_brackets(prune, num_steps)
    bracket = _bracket_of(trial.number, count, prune.factor)
    rivals = [each for each in others if _bracket_of(each.number, count, prune.factor) == bracket]
    rung = prune.first_step * prune.factor**bracket
    while rung < num_steps:
        mine = _at(trial, rung)
        if mine is None:
            return
        step, loss = mine
        there = sorted([loss, *(theirs[1] for theirs in (_at(each, rung) for each in rivals) if theirs is not None)])
        if not loss <= there[max(len(there) // prune.factor - 1, 0)]:
            yield step
        rung *= prune.factor


def _at(trial: Trial, rung: int) -> tuple[int, float] | None:
    """Return step and loss of the first evaluation at `rung` or later."""
    return next(((point.step, point.held_out_loss) for point in trial.curve if point.step >= rung), None)


def _num_brackets(prune: PruneSection, num_steps: int) -> int:
    return max(1, math.floor(math.log(max(num_steps / prune.first_step, 1), prune.factor)) + 1)


def _bracket_of(number: int, count: int, factor: int) -> int:
    """Return a trial's bracket: drawn by its number, with the shares of Hyperband's table."""
    budgets = [math.ceil(count * factor ** (count - 1 - each) / (count - each)) for each in range(count)]
    place = zlib.crc32(f"trial {number}".encode()) % sum(budgets)
    for bracket, budget in enumerate(budgets):
        place -= budget
        if place < 0:
            return bracket
    raise AssertionError("the place is below the sum of the budgets")
