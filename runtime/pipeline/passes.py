"""Passes over a schedule: add the sends and receives, then prove that the result can run.

A transfer has two ends. `SEND_F(s, m)` starts sending the output of stage s; `RECV_F(s + 1, m)` posts the receive of
the input of stage s + 1. Backward mirrors it: `SEND_B(s, m)` starts sending the gradient of stage s's input and
`RECV_B(s - 1, m)` posts the receive of the gradient of stage s - 1's output. Both ends are non-blocking; only F and B
wait, for the input they need. Messages of one channel (sender, receiver, forward or backward) arrive in the order in
which they were sent. The two directions never share a channel, even where two ranks are neighbours of each other on
both sides (pp = 2 with chunks).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest

from trimaran.runtime.pipeline.schedule import Action, ActionKind, Schedule, rank_of_stage

_EXAMPLES_PER_PROBLEM = 5  # how many actions an error names before it only counts

_BACKWARD_KINDS = frozenset({ActionKind.B, ActionKind.SEND_B, ActionKind.RECV_B})

# The tables below define who communicates with whom: forwards go up the stages, backwards down.
_PARTNERS = {
    ActionKind.SEND_F: (ActionKind.RECV_F, 1),
    ActionKind.RECV_F: (ActionKind.SEND_F, -1),
    ActionKind.SEND_B: (ActionKind.RECV_B, -1),
    ActionKind.RECV_B: (ActionKind.SEND_B, 1),
}
_MAKER_OF = {
    ActionKind.SEND_F: ActionKind.F,
    ActionKind.SEND_B: ActionKind.B,
}  # a send -> the compute action that makes its data
# A compute action -> the receive of its input, the send of its result, and the step from its stage to the one its input
# is from.
_ENDS_OF = {
    ActionKind.F: (ActionKind.RECV_F, ActionKind.SEND_F, -1),
    ActionKind.B: (ActionKind.RECV_B, ActionKind.SEND_B, 1),
}
# In Python 3.11 an enum member lookup costs more than the rest of a loop over actions.
_FORWARD, _BACKWARD = ActionKind.F, ActionKind.B


class ScheduleError(ValueError):
    """A schedule that cannot run, or would not compute the whole batch.

    Attributes:
        problems: the broken rules, one sentence each (empty for a pure deadlock).
        blocked: for each rank that cannot finish, its blocked action and what that waits for (empty if all finish).
    """

    def __init__(self, problems: Sequence[str], blocked: Sequence[str] = ()) -> None:
        # Both go to args so that the error survives pickling between processes.
        super().__init__(list(problems), list(blocked))
        self.problems = list(problems)
        self.blocked = list(blocked)

    def __str__(self) -> str:
        lines = ["the schedule is not valid" if self.problems else "the schedule deadlocks"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  {line}" for line in self.blocked] or ["  no rank is blocked"]
        return "\n".join(lines)


def partner(action: Action) -> Action:
    """The other end of a transfer: the receive of a send, the send of a receive.

    Raises:
        ValueError: `action` is a compute action.
    """
    if action.kind.is_compute:
        raise ValueError(f"only sends and receives have a partner; got {action}")
    kind, step = _PARTNERS[action.kind]
    return Action(kind, action.stage + step, action.microbatch)


def peer_rank(action: Action, num_ranks: int) -> int:
    """The pipeline rank at the other end of a send or a receive.

    Raises:
        ValueError: `action` is a compute action.
    """
    return rank_of_stage(partner(action).stage, num_ranks)


def has_communication(schedule: Sequence[Sequence[Action]]) -> bool:
    """Whether any rank sends or receives."""
    return any(not action.kind.is_compute for actions in schedule for action in actions)


def add_communication(schedule: Sequence[Sequence[Action]]) -> Schedule:
    """The schedule with its sends and receives; compute actions keep their order.

    A send is directly after the action that made its data. A receive is posted one compute action before the one that
    needs it, so that the transfer overlaps that compute; the first action's receive is directly before it. Stages on
    the same rank pass their tensors without a transfer.

    Raises:
        ScheduleError: the schedule has communication already.
    """
    if has_communication(schedule):
        raise ScheduleError(
            ["add_communication takes compute actions (F and B) only, and this schedule has sends or receives already"]
        )
    num_ranks = len(schedule)
    last_stage = max((action.stage for actions in schedule for action in actions), default=-1)
    result: Schedule = []
    for actions in schedule:
        receives = [_receive_for(action, num_ranks, last_stage) for action in actions]
        out: list[Action] = receives[0][:] if receives else []
        for index, action in enumerate(actions):
            out += receives[index + 1] if index + 1 < len(actions) else []
            out.append(action)
            out += _send_after(action, num_ranks, last_stage)
        result.append(out)
    return result


def validate(
    schedule: Sequence[Sequence[Action]], *, num_stages: int | None = None, num_microbatches: int | None = None
) -> None:
    """Prove that a schedule with communication runs to its end and computes every microbatch in every stage.

    Checked: every stage is on rank `stage % num_ranks`; every stage runs every microbatch forward exactly once, and
    backward exactly once (or never: a forward-only schedule); every transfer between ranks has one send and one
    receive, and there is no other communication; both ends of a channel list their messages in the same order; and when
    the lists are played, with F and B waiting for their inputs, no rank stays blocked (which also proves B after F,
    send after compute and receive before use).

    Args:
        num_stages: expected number of stages; None takes the highest stage in the schedule.
        num_microbatches: expected number of microbatches; None takes the highest microbatch in the schedule.

    Raises:
        ScheduleError: a rule is broken; names the actions and, where ranks cannot finish, each one's blocked action.
    """
    everything = [action for actions in schedule for action in actions]
    if not everything:
        raise ScheduleError([f"the schedule has {len(schedule)} ranks and no action"])
    top_stage = max(action.stage for action in everything)
    top_microbatch = max(action.microbatch for action in everything)
    shape = _Shape(
        num_ranks=len(schedule),
        num_stages=top_stage + 1 if num_stages is None else num_stages,
        num_microbatches=top_microbatch + 1 if num_microbatches is None else num_microbatches,
        backward=any(action.kind is ActionKind.B for action in everything),
    )
    problems = _inventory_problems(schedule, shape)
    if not problems:
        problems = _order_problems(schedule, shape)
    blocked = _blocked_ranks(schedule, shape)
    if problems or blocked:
        raise ScheduleError(problems, blocked)


class _Shape:
    """The sizes that a schedule must match, and the set of actions they imply."""

    def __init__(self, num_ranks: int, num_stages: int, num_microbatches: int, backward: bool) -> None:
        self.num_ranks = num_ranks
        self.num_stages = num_stages
        self.num_microbatches = num_microbatches
        self.kinds = [kind for kind in ActionKind if backward or kind not in _BACKWARD_KINDS]

    def stage_allows(self, kind: ActionKind, stage: int) -> bool:
        """Whether `stage` has actions of `kind`; includes the bounds that do not depend on the kind."""
        if kind not in self.kinds or not 0 <= stage < self.num_stages:
            return False
        if kind.is_compute:
            return True
        if self.num_ranks == 1:
            return False
        return stage > 0 if kind in (ActionKind.RECV_F, ActionKind.SEND_B) else stage < self.num_stages - 1

    def allows(self, action: Action, rank: int) -> bool:
        on_its_rank = rank_of_stage(action.stage, self.num_ranks) == rank
        return (
            on_its_rank
            and 0 <= action.microbatch < self.num_microbatches
            and self.stage_allows(action.kind, action.stage)
        )

    def num_actions(self) -> int:
        per_kind = [
            self.num_stages if kind.is_compute else self.num_stages - 1
            for kind in self.kinds
            if kind.is_compute or self.num_ranks > 1
        ]
        return sum(per_kind) * self.num_microbatches

    def actions(self) -> Iterator[Action]:
        """Every action the schedule must contain, exactly once each."""
        for kind in self.kinds:
            for stage in range(self.num_stages):
                if self.stage_allows(kind, stage):
                    yield from (Action(kind, stage, m) for m in range(self.num_microbatches))


def _receive_for(action: Action, num_ranks: int, last_stage: int) -> list[Action]:
    receive, _, step = _ENDS_OF[action.kind]
    if num_ranks == 1 or not 0 <= action.stage + step <= last_stage:
        return []
    return [Action(receive, action.stage, action.microbatch)]


def _send_after(action: Action, num_ranks: int, last_stage: int) -> list[Action]:
    _, send, step = _ENDS_OF[action.kind]
    if num_ranks == 1 or not 0 <= action.stage - step <= last_stage:
        return []
    return [Action(send, action.stage, action.microbatch)]


def _inventory_problems(schedule: Sequence[Sequence[Action]], shape: _Shape) -> list[str]:
    """Sentences on missing, repeated and misplaced actions."""
    problems = []
    if shape.num_stages % shape.num_ranks:
        problems.append(f"{shape.num_stages} stages cannot be dealt evenly to {shape.num_ranks} ranks")
    counts = Counter(action for actions in schedule for action in actions)
    doubled = [f"{action} ({count} times)" for action, count in counts.items() if count > 1]
    stray = [
        f"{action} on rank {rank}"
        for rank, actions in enumerate(schedule)
        for action in actions
        if not shape.allows(action, rank)
    ]
    missing: list[str] = []
    # If there are as many different allowed actions as required, none is missing; check each only otherwise.
    if doubled or stray or len(counts) != shape.num_actions():
        # Lazily: one stray action with a huge index must not build a list of millions of missing ones.
        missing = [
            str(action) for action in islice((a for a in shape.actions() if a not in counts), _EXAMPLES_PER_PROBLEM + 1)
        ]
    size = f"{shape.num_stages} stages x {shape.num_microbatches} microbatches on {shape.num_ranks} ranks"
    if shape.num_ranks > 1 and not has_communication(schedule):
        problems.append("no rank sends or receives: run add_communication first")
    elif missing:
        problems.append(f"missing from {size}: {_listing(missing)}")
    if doubled:
        problems.append(f"more than once: {_listing(doubled)}")
    if stray:
        problems.append(
            f"does not belong there (stage s lives on rank s % {shape.num_ranks}; {size}): {_listing(stray)}"
        )
    return problems


def _order_problems(schedule: Sequence[Sequence[Action]], shape: _Shape) -> list[str]:
    """Channels whose two ends list their messages in different orders; no action may be missing or repeated."""
    sent: dict[tuple[int, int, ActionKind], list[Action]] = {}
    posted: dict[tuple[int, int, ActionKind], list[Action]] = {}
    for rank, actions in enumerate(schedule):
        for action in actions:
            if action.kind in _MAKER_OF:
                receive = partner(action)
                sent.setdefault((rank, rank_of_stage(receive.stage, shape.num_ranks), receive.kind), []).append(receive)
            elif not action.kind.is_compute:
                posted.setdefault((peer_rank(action, shape.num_ranks), rank, action.kind), []).append(action)
    problems = []
    for (source, target, kind), receives in sorted(
        sent.items(), key=lambda item: (item[0][0], item[0][1], item[0][2].value)
    ):
        for position, (due, found) in enumerate(zip_longest(receives, posted.get((source, target, kind), []))):
            if due != found:
                problems.append(
                    f"rank {source} -> rank {target}: message {position} is {partner(due)}, "
                    f"but rank {target} posts {found} where {due} is due; both ends must use the same order"
                )
                break
    return problems


def _needs(action: Action, shape: _Shape) -> list[Action]:
    """The action that must run before `action`: all waiting, in any schedule, is defined here."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind in _MAKER_OF:
        return [Action(_MAKER_OF[kind], stage, microbatch)]
    if kind not in _ENDS_OF:
        return []
    receive, send, step = _ENDS_OF[kind]
    needs = [Action(_FORWARD, stage, microbatch)] if kind is _BACKWARD else []
    source = stage + step
    if 0 <= source < shape.num_stages:
        if shape.num_ranks == 1:
            needs.append(Action(kind, source, microbatch))
        else:
            needs += [Action(receive, stage, microbatch), Action(send, source, microbatch)]
    return needs


def _blocked_ranks(schedule: Sequence[Sequence[Action]], shape: _Shape) -> list[str]:
    """Plays all lists; returns a sentence for each rank that cannot finish.

    Each rank runs until an action misses its input, sleeps until another rank provides it, and is then woken, so the
    time is linear in the number of actions. The order in which ranks move does not change which get stuck: a runnable
    action stays runnable.
    """
    done: set[Action] = set()
    next_index = [0] * len(schedule)
    sleepers: dict[Action, list[int]] = {}
    awake = list(range(len(schedule)))
    while awake:
        rank = awake.pop()
        actions = schedule[rank]
        while next_index[rank] < len(actions):
            action = actions[next_index[rank]]
            need = next((need for need in _needs(action, shape) if need not in done), None)
            if need is not None:
                sleepers.setdefault(need, []).append(rank)
                break
            done.add(action)
            awake += sleepers.pop(action, [])
            next_index[rank] += 1
    needed_by = {rank: need for need, ranks in sleepers.items() for rank in ranks}
    holders = {action: rank for rank, actions in enumerate(schedule) for action in actions} if needed_by else {}
    return [
        _blocked_line(rank, schedule[rank], next_index[rank], needed_by[rank], holders.get(needed_by[rank]))
        for rank in sorted(needed_by)
    ]


def _blocked_line(rank: int, actions: Sequence[Action], index: int, need: Action, holder: int | None) -> str:
    if holder is None:
        where = "which no rank has"
    elif holder == rank:
        where = "which stands later in its own list"
    else:
        where = f"on rank {holder}"
    return (
        f"rank {rank} is blocked at {actions[index]} (action {index + 1} of "
        f"{len(actions)}), waiting for {need}, {where}"
    )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_EXAMPLES_PER_PROBLEM])
    return shown if len(names) <= _EXAMPLES_PER_PROBLEM else f"{shown}, ..."
