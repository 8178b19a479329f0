"""Schedules that fill the pipeline's bubble with weight gradients (Qi et al. 2024, "Zero Bubble Pipeline Parallelism").

A backward is two actions: I, the gradient of the stage's input, for which the previous stage waits, and W, the
gradients of its weights, which can wait. The order of F and I is fixed; the Ws are woven in where the simulated rank
waits.
"""

from collections import deque
from collections.abc import Callable, Sequence

from trimaran.runtime.pipeline.action import Action, ActionKind, Entry
from trimaran.runtime.pipeline.schedule import Placement, Schedule, round_robin, v_shape
from trimaran.runtime.pipeline.simulate import Costs

_F, _I, _W = ActionKind.F, ActionKind.I, ActionKind.W
_ROUNDING = 1e-9


def zb_h1(num_ranks: int, num_microbatches: int, costs: Costs) -> Schedule:
    """ZB-H1: 1F1B's memory, a third of its bubble (Qi et al. 2024, section 2.3.1).

    A rank holds at most p microbatches between F and W, as 1F1B's first rank does. With equal stages the idle time is
    (p - 1)(F + I - W).
    """
    return _one_stage_a_rank(num_ranks, num_microbatches, costs, lambda rank: num_ranks - rank, num_ranks)


def zb_h2(num_ranks: int, num_microbatches: int, costs: Costs) -> Schedule:
    """ZB-H2: no bubble inside a rank's span, at almost twice the memory (Qi et al. 2024, section 2.3.2).

    A rank holds at most 2p - 1 microbatches between F and W. With equal stages the idle time is (p - 1)(F + I - 2W).
    """
    return _one_stage_a_rank(
        num_ranks, num_microbatches, costs, lambda rank: 2 * (num_ranks - rank) - 1, 2 * num_ranks - 1
    )


def zbv(num_ranks: int, num_microbatches: int, costs: Costs) -> Schedule:
    """ZB-V: ZB-H2's idle time at 1F1B's memory (Qi et al. 2024, section 6).

    Two stages a rank, down the ranks and up again; at most 2p (stage, microbatch) pairs between F and W.
    """
    orders = [_v_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return weave_weights(v_shape(num_ranks), orders, 2 * num_ranks, costs)


def _one_stage_a_rank(
    num_ranks: int, num_microbatches: int, costs: Costs, warmup: Callable[[int], int], most_held: int
) -> Schedule:
    """After `warmup(rank)` forwards, backwards and forwards in turn."""
    orders = []
    for rank in range(num_ranks):
        first = min(warmup(rank), num_microbatches)
        order = [Action(_F, rank, m) for m in range(first)]
        for m in range(num_microbatches):
            order.append(Action(_I, rank, m))
            if first + m < num_microbatches:
                order.append(Action(_F, rank, first + m))
        orders.append(order)
    return weave_weights(round_robin(num_ranks), orders, most_held, costs)


def _v_order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """F and I of a rank: a long warm-up down, then one of each a stage in turn, then the rest of the backwards."""
    down, up = rank, 2 * num_ranks - 1 - rank
    behind = num_ranks - rank
    kinds = [(_F, down)] * (2 * behind - 1) + [(_F, up), (_F, down)] * rank + [(_F, up), (_I, up)] * behind
    whole = max(num_microbatches, 2 * num_ranks - 1)  # what fills the pattern; the microbatches beyond are left out
    turns, with_down = whole - num_ranks, whole - (2 * behind - 1) - rank
    kinds += [(_F, down), (_I, down), (_F, up), (_I, up)] * with_down
    kinds += [(_I, down), (_F, up), (_I, up)] * (turns - with_down)
    kinds += [(_I, down), (_I, up)] * rank + [(_I, down)] * behind
    done = dict.fromkeys(kinds, 0)
    order = []
    for kind in kinds:
        order.append(Action(*kind, done[kind]))
        done[kind] += 1
    return [action for action in order if action.microbatch < num_microbatches]


def weave_weights(placement: Placement, orders: Sequence[Sequence[Action]], most_held: int, costs: Costs) -> Schedule:
    """Return the schedule of the ranks' F and I with their Ws, in the order of their Is.

    The ranks are played as `simulate` plays them. A rank runs a W where it fits into a wait for the next F or I, and
    where it must because it holds `most_held` (stage, microbatch) pairs between F and W already.

    Args:
        orders: for each rank its F and I actions.
        costs: the times to plan with.

    Raises:
        ValueError: the orders deadlock, or `most_held` is too small for them.
    """
    planner = _Planner(placement, orders, most_held, costs)
    while (option := planner.next()) is not None:
        planner.run(*option)
    if any(planner.left):
        raise ValueError(f"the forwards and backwards can't run with at most {most_held} held; allow more")
    return Schedule(placement, tuple(tuple(entries) for entries in planner.entries))


class _Planner:
    """The state of the ranks while they are played."""

    def __init__(self, placement: Placement, orders: Sequence[Sequence[Action]], most_held: int, costs: Costs) -> None:
        self.placement, self.most_held, self.costs = placement, most_held, costs
        self.left = [deque(order) for order in orders]
        self.weights: list[deque[Action]] = [deque() for _ in orders]
        self.entries: list[list[Entry]] = [[] for _ in orders]
        self.now = [0.0] * len(orders)
        self.held = [0] * len(orders)
        self.arrivals: dict[Action, float] = {}  # F or I -> when its input is there
        self.options = [self._next_of(rank) for rank in range(len(orders))]  # what each rank would start next

    def next(self) -> tuple[float, int, Action] | None:
        """The action that starts first, with its start and its rank; None where none can."""
        return min((each for each in self.options if each is not None), key=lambda each: each[:2], default=None)

    def _next_of(self, rank: int) -> tuple[float, int, Action] | None:
        now, start = self.now[rank], float("inf")
        action = self.left[rank][0] if self.left[rank] else None
        if action is not None and not (action.kind is _F and self.held[rank] >= self.most_held):
            is_first = action.kind is _F and action.stage == 0
            start = max(now, 0.0 if is_first else self.arrivals.get(action, start))
        if self.weights[rank]:
            weights = self.weights[rank][0]
            if now + self.costs.times[_W][weights.stage] <= start + _ROUNDING:
                return now, rank, weights
        return None if action is None or start == float("inf") else (start, rank, action)

    def run(self, start: float, rank: int, action: Action) -> None:
        """Run the action from `start` on."""
        for affected in {rank, self._advance(start, rank, action)}:
            self.options[affected] = self._next_of(affected)

    def _advance(self, start: float, rank: int, action: Action) -> int:
        """Move the rank on; return the rank to which the action's result goes."""
        stop = start + self.costs.times[action.kind][action.stage]
        self.entries[rank].append(action)
        self.now[rank] = stop
        if action.kind is _W:
            self.weights[rank].popleft()
            self.held[rank] -= 1
            return rank
        self.left[rank].popleft()
        if action.kind is _I:
            self.weights[rank].append(Action(_W, action.stage, action.microbatch))
        else:
            self.held[rank] += 1
        after = action.stage + (1 if action.kind is _F else -1)
        if action.kind is _F and after == len(self.placement):
            self.arrivals[Action(_I, action.stage, action.microbatch)] = stop
        elif after >= 0:
            wire = 0.0 if self.placement[after] == rank else self.costs.transfer
            self.arrivals[Action(action.kind, after, action.microbatch)] = stop + wire
            return self.placement[after]
        return rank
