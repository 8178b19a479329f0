"""Passes over a schedule: add the sends and receives, then prove that the result can run.

A transfer has two ends. `SEND_F(s, m)` starts sending the output of stage s; `RECV_F(s + 1, m)` posts the receive of
the input of stage s + 1. Backward mirrors it: `SEND_B(s, m)` starts sending the gradient of stage s's input and
`RECV_B(s - 1, m)` posts the receive of the gradient of stage s - 1's output. Both ends are non-blocking; only F, B and
I wait, for the input they need. Messages of one channel (sender, receiver, forward or backward) arrive in the order in
which they were sent. The two directions never share a channel, even where two ranks are neighbours of each other on
both sides (pp = 2 with chunks).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest

from trimaran.runtime.pipeline.action import KINDS, Action, ActionKind, Entry, actions_of
from trimaran.runtime.pipeline.schedule import Placement, Schedule

Channel = tuple[int, int, ActionKind]
"""(sender, receiver, kind of the receive)."""
_EXAMPLES_PER_PROBLEM = 5  # how many actions an error names before it only counts
_MOST_STAGES_SHOWN = 8
_BACKWARDS = (ActionKind.B, ActionKind.I, ActionKind.W)


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
        lines += [f"  {line}" for line in self.blocked]
        return "\n".join(lines)


def partner(action: Action) -> Action:
    """The other end of a transfer: the receive of a send, the send of a receive.

    Raises:
        ValueError: `action` is a compute action.
    """
    row = KINDS[action.kind]
    if row.partner is None or row.step is None:
        raise ValueError(f"only sends and receives have a partner; got {action}")
    return Action(row.partner, action.stage + row.step, action.microbatch)


def peer_rank(action: Action, placement: Placement) -> int:
    """The pipeline rank at the other end of a send or a receive.

    Raises:
        ValueError: `action` is a compute action.
    """
    return placement[partner(action).stage]


def has_communication(schedule: Schedule) -> bool:
    """Whether any rank sends or receives."""
    return any(not entry.is_compute for entries in schedule.actions for entry in entries)


def add_communication(schedule: Schedule) -> Schedule:
    """The schedule with its sends and receives; compute actions keep their order.

    A send is directly after the entry that made its data. A receive is posted one compute entry before the one that
    needs it, so that the transfer overlaps that compute; the first entry's receive is directly before it. A channel's
    receives are posted in the order in which its messages are sent. Stages on the same rank pass their tensors without
    a transfer.

    Raises:
        ScheduleError: the schedule has communication already.
    """
    if has_communication(schedule):
        raise ScheduleError(
            ["add_communication takes compute actions only, and this schedule has sends or receives already"]
        )
    sent, numbers = _sent(schedule)
    result = []
    for rank, entries in enumerate(schedule.actions):
        posted: Counter[Channel] = Counter()  # how many receives of a channel are posted

        def to_post(receive: Action, rank: int = rank, posted: Counter[Channel] = posted) -> list[Action]:
            """The receives of the channel that are sent before this one and not posted yet, and itself."""
            channel = (peer_rank(receive, schedule.placement), rank, receive.kind)
            if receive not in numbers:  # nobody sends it, as `validate` will say
                return [receive]
            first, posted[channel] = posted[channel], max(posted[channel], numbers[receive] + 1)
            return sent[channel][first : posted[channel]]

        wanted = [_transfers(entry, schedule.placement, receive=True) for entry in entries]
        receives = [[each for receive in few for each in to_post(receive)] for few in wanted]
        out: list[Entry] = [*receives[0]] if receives else []
        for index, entry in enumerate(entries):
            out += receives[index + 1] if index + 1 < len(entries) else []
            out.append(entry)
            out += _transfers(entry, schedule.placement, receive=False)
        result.append(tuple(out))
    return Schedule(schedule.placement, tuple(result))


def _sent(schedule: Schedule) -> tuple[dict[Channel, list[Action]], dict[Action, int]]:
    """The receives of each channel's messages in the order of sending, and the number of each receive there."""
    sent: dict[Channel, list[Action]] = {}
    numbers: dict[Action, int] = {}
    for rank, entries in enumerate(schedule.actions):
        for entry in entries:
            for send in _transfers(entry, schedule.placement, receive=False):
                receive = partner(send)
                if receive not in numbers:
                    messages = sent.setdefault((rank, schedule.placement[receive.stage], receive.kind), [])
                    numbers[receive] = len(messages)
                    messages.append(receive)
    return sent, numbers


def _transfers(entry: Entry, placement: Placement, *, receive: bool) -> list[Action]:
    """The receives of an entry's inputs from other ranks, or the sends of its results to them."""
    found: list[Action] = []
    for action in entry.parts:
        row = KINDS[action.kind]
        kind = row.receive if receive else row.send
        other = _neighbour(action, placement, -1 if receive else 1)
        if kind is not None and other is not None and placement[other] != placement[action.stage]:
            found.append(Action(kind, action.stage, action.microbatch))
    return found


def _neighbour(action: Action, placement: Placement, direction: int) -> int | None:
    """The stage that makes the input of a compute action (direction -1) or takes its result (1), if there is one."""
    step = KINDS[action.kind].step
    other = -1 if step is None else action.stage - direction * step
    return other if 0 <= min(other, action.stage) <= max(other, action.stage) < len(placement) else None


def validate(schedule: Schedule, *, num_stages: int | None = None, num_microbatches: int | None = None) -> None:
    """Prove that a schedule with communication runs to its end and computes every microbatch in every stage.

    Checked: every stage's actions are on its rank; every stage runs every microbatch forward exactly once, and backward
    exactly once, as B or as I and W (or never: a forward-only schedule); every transfer between ranks has one send and
    one receive, and there is no other communication; both ends of a channel list their messages in the same order; and
    when the lists are played, with compute waiting for its inputs, no rank stays blocked (which also proves backward
    after forward, send after compute and receive before use). An overlap waits for the inputs of both its actions.

    Args:
        num_stages: expected number of stages; None takes the placement's.
        num_microbatches: expected number of microbatches; None takes the highest microbatch in the schedule.

    Raises:
        ScheduleError: a rule is broken; names the actions and, where ranks cannot finish, each one's blocked action.
    """
    everything = [action for entries in schedule.actions for action in actions_of(entries)]
    if not everything:
        raise ScheduleError([f"the schedule has {schedule.num_ranks} ranks and no action"])
    top_microbatch = max(action.microbatch for action in everything)
    shape = _Shape(
        schedule.placement,
        schedule.num_ranks,
        schedule.num_stages if num_stages is None else num_stages,
        top_microbatch + 1 if num_microbatches is None else num_microbatches,
        everything,
    )
    problems = _inventory_problems(schedule, shape)
    if not problems:
        problems = _order_problems(schedule)
    blocked = _blocked_ranks(schedule, shape)
    if problems or blocked:
        raise ScheduleError(problems, blocked)


class _Shape:
    """The sizes that a schedule must match, which backwards are split, and the actions that they imply."""

    def __init__(
        self,
        placement: Placement,
        num_ranks: int,
        num_stages: int,
        num_microbatches: int,
        everything: Sequence[Action],
    ) -> None:
        self.placement = placement
        self.num_ranks = num_ranks
        self.num_stages = num_stages
        self.num_microbatches = num_microbatches
        self.has_backward = any(action.kind in _BACKWARDS for action in everything)
        self.split = {
            (action.stage, action.microbatch)
            for action in everything
            if action.kind in (ActionKind.I, ActionKind.W) and self._in_bounds(action)
        }

    def _in_bounds(self, action: Action) -> bool:
        return (
            0 <= action.stage < min(self.num_stages, len(self.placement))
            and 0 <= action.microbatch < self.num_microbatches
        )

    def _kinds_of(self, stage: int, microbatch: int) -> Iterator[ActionKind]:
        """The kinds that the stage must have for the microbatch, once each."""
        compute = [ActionKind.F]
        if self.has_backward:
            compute += [ActionKind.I, ActionKind.W] if (stage, microbatch) in self.split else [ActionKind.B]
        for kind in compute:
            yield kind
            action, row = Action(kind, stage, microbatch), KINDS[kind]
            for transfer, direction in ((row.receive, -1), (row.send, 1)):
                other = _neighbour(action, self.placement[: self.num_stages], direction)
                if transfer is not None and other is not None and self.placement[other] != self.placement[stage]:
                    yield transfer

    def allows(self, action: Action, rank: int) -> bool:
        """Whether `action` belongs on `rank`."""
        return (
            self._in_bounds(action)
            and self.placement[action.stage] == rank
            and action.kind in self._kinds_of(action.stage, action.microbatch)
        )

    def actions(self) -> Iterator[Action]:
        """Every action the schedule must contain, exactly once each."""
        for stage in range(self.num_stages):
            for m in range(self.num_microbatches):
                if stage >= len(self.placement):
                    yield Action(ActionKind.F, stage, m)
                    continue
                yield from (Action(kind, stage, m) for kind in self._kinds_of(stage, m))

    def needs(self, action: Action) -> Iterator[Action]:
        """The actions that must run before `action`: all waiting, in any schedule, is defined here."""
        row, stage, m = KINDS[action.kind], action.stage, action.microbatch
        if row.after:
            yield Action(row.after[0] if len(row.after) == 1 else self._backward_kind(stage, m), stage, m)
        source = _neighbour(action, self.placement, -1) if action.kind.is_compute else None
        if source is None or row.receive is None:
            return
        if self.placement[source] == self.placement[stage]:
            yield Action(ActionKind.F if action.kind is ActionKind.F else self._backward_kind(source, m), source, m)
        else:
            receive = Action(row.receive, stage, m)
            yield receive
            yield partner(receive)

    def _backward_kind(self, stage: int, microbatch: int) -> ActionKind:
        return ActionKind.I if (stage, microbatch) in self.split else ActionKind.B


def _inventory_problems(schedule: Schedule, shape: _Shape) -> list[str]:
    """Sentences on missing, repeated and misplaced actions."""
    problems = []
    idle = sorted(set(range(shape.num_ranks)) - set(shape.placement))
    if idle:
        problems.append(f"no stage lives on rank {idle[0]}")
    counts = Counter(action for entries in schedule.actions for action in actions_of(entries))
    doubled = [f"{action} ({count} times)" for action, count in counts.items() if count > 1]
    stray = [
        f"{action} on rank {rank}"
        for rank, entries in enumerate(schedule.actions)
        for action in actions_of(entries)
        if not shape.allows(action, rank)
    ]
    # Lazily: one stray action with a huge index must not build a list of millions of missing ones.
    missing = [
        str(action) for action in islice((a for a in shape.actions() if a not in counts), _EXAMPLES_PER_PROBLEM + 1)
    ]
    size = f"{shape.num_stages} stages x {shape.num_microbatches} microbatches on {shape.num_ranks} ranks"
    needs_transfers = len(set(shape.placement)) > 1
    if needs_transfers and not has_communication(schedule):
        problems.append("no rank sends or receives: run add_communication first")
    elif missing:
        problems.append(f"missing from {size}: {_listing(missing)}")
    if doubled:
        problems.append(f"more than once: {_listing(doubled)}")
    if stray:
        where = ", ".join(f"{stage} on {rank}" for stage, rank in enumerate(shape.placement[:_MOST_STAGES_SHOWN]))
        where += ", ..." if len(shape.placement) > _MOST_STAGES_SHOWN else ""
        problems.append(f"does not belong there (stages on ranks: {where}; {size}): {_listing(stray)}")
    return problems


def _order_problems(schedule: Schedule) -> list[str]:
    """Channels whose two ends list their messages in different orders; no action may be missing or repeated."""
    sent: dict[tuple[int, int, ActionKind], list[Action]] = {}
    posted: dict[tuple[int, int, ActionKind], list[Action]] = {}
    for rank, entries in enumerate(schedule.actions):
        for action in actions_of(entries):
            if action.kind.is_compute:
                continue
            peer = peer_rank(action, schedule.placement)
            if action.kind.is_send:
                receive = partner(action)
                sent.setdefault((rank, peer, receive.kind), []).append(receive)
            else:
                posted.setdefault((peer, rank, action.kind), []).append(action)
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


def _blocked_ranks(schedule: Schedule, shape: _Shape) -> list[str]:
    """Plays all lists; returns a sentence for each rank that cannot finish.

    Each rank runs until an entry misses an input, sleeps until another rank provides it, and is then woken, so the
    time is linear in the number of actions. The order in which ranks move does not change which get stuck: a runnable
    entry stays runnable.
    """
    done: set[Action] = set()
    next_index = [0] * schedule.num_ranks
    sleepers: dict[Action, list[int]] = {}
    awake = list(range(schedule.num_ranks))
    while awake:
        rank = awake.pop()
        entries = schedule.actions[rank]
        while next_index[rank] < len(entries):
            entry = entries[next_index[rank]]
            need = next((need for action in entry.parts for need in shape.needs(action) if need not in done), None)
            if need is not None:
                sleepers.setdefault(need, []).append(rank)
                break
            for action in entry.parts:
                done.add(action)
                awake += sleepers.pop(action, [])
            next_index[rank] += 1
    needed_by = {rank: need for need, ranks in sleepers.items() for rank in ranks}
    holders = {}
    if needed_by:
        holders = {action: rank for rank, entries in enumerate(schedule.actions) for action in actions_of(entries)}
    return [
        _blocked_line(rank, schedule.actions[rank], next_index[rank], needed_by[rank], holders.get(needed_by[rank]))
        for rank in sorted(needed_by)
    ]


def _blocked_line(rank: int, entries: Sequence[Entry], index: int, need: Action, holder: int | None) -> str:
    if holder is None:
        where = "which no rank has"
    elif need in entries[index].parts:
        where = "which is a part of it"
    elif holder == rank:
        where = "which stands later in its own list"
    else:
        where = f"on rank {holder}"
    return (
        f"rank {rank} is blocked at {entries[index]} (action {index + 1} of "
        f"{len(entries)}), waiting for {need}, {where}"
    )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_EXAMPLES_PER_PROBLEM])
    return shown if len(names) <= _EXAMPLES_PER_PROBLEM else f"{shown}, ..."
