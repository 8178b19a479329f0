"""What a schedule costs, without running it: makespan, idle time, what a rank holds at most, and the spans to draw.

Times have the unit of the costs; give milliseconds, because `draw` labels its axis so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from trimaran.runtime.pipeline.action import KINDS, Action, ActionKind, Entry, actions_of
from trimaran.runtime.pipeline.passes import add_communication, has_communication, partner, validate
from trimaran.runtime.pipeline.schedule import Schedule

# In Python 3.11 an enum member lookup costs more than the rest of a loop over actions.
_F, _B, _I, _W = ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W
_COMPUTE = (_F, _B, _I, _W)


@dataclass(frozen=True, slots=True)
class Costs:
    """Times and memory of one microbatch: an entry per compute kind and stage (all stages of the pipeline, in order).

    Attributes:
        times: how long an action takes, in milliseconds.
        held: how much an action adds to what its rank holds until a later action releases it, in any unit. A forward
            adds when it starts; a backward releases (a negative number) when it ends.
        transfer: time of one message between two ranks, forward or backward, in milliseconds.
        overlap: time of an overlap as a share of that of its two actions one after the other.
    """

    times: Mapping[ActionKind, Sequence[float]]
    held: Mapping[ActionKind, Sequence[float]]
    transfer: float = 0.0
    overlap: float = 1.0

    @staticmethod
    def of_stages(
        forward: Sequence[float],
        backward: Sequence[float],
        weights: Sequence[float] | None = None,
        *,
        transfer: float = 0.0,
        overlap: float = 1.0,
    ) -> "Costs":
        """Costs from each stage's times; each stage holds 1 from its forward to the end of its backward (B, or W).

        Args:
            backward: time of B, an entry a stage.
            weights: time of W; I takes the rest of B. None: half of B.
        """
        w = [each / 2 for each in backward] if weights is None else weights
        times = {_F: forward, _B: backward, _I: [b - each for b, each in zip(backward, w, strict=True)], _W: w}
        held = {kind: [float({_F: 1, _B: -1, _I: 0, _W: -1}[kind])] * len(forward) for kind in _COMPUTE}
        return Costs(times, held, transfer, overlap)

    @staticmethod
    def uniform(
        num_stages: int, forward: float = 1.0, backward: float = 2.0, transfer: float = 0.0, overlap: float = 1.0
    ) -> "Costs":
        """Equal stages. A backward has two matrix products for each one of the forward, so it takes twice the time."""
        return Costs.of_stages([forward] * num_stages, [backward] * num_stages, transfer=transfer, overlap=overlap)


@dataclass(frozen=True, slots=True)
class Span:
    """`action` of pipeline rank `rank`, from `start` to `stop` in milliseconds from the start of the step.

    The span of a send is the transfer on the wire, which overlaps the rank's compute.
    """

    rank: int
    action: Action
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated schedule.

    Attributes:
        makespan: milliseconds from the first start to the last stop.
        bubble: share of makespan in which a rank does not compute, averaged over ranks, in [0, 1): what a step that
            ends in a collective of all ranks waits.
        idle: for each rank, milliseconds between its first start and its last stop in which it does not compute: the
            papers' bubble.
        peak_held: for each rank, the most that it holds, in the unit of `Costs.held`; in a forward-only schedule only
            the running forward counts, since none waits for a backward.
        spans: of compute, and of transfers where they take time; ordered by rank, then start.
    """

    makespan: float
    bubble: float
    idle: list[float]
    peak_held: list[float]
    spans: list[Span]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Play `schedule` as the executor does and time it.

    A rank computes one entry at a time. Sends overlap compute: a transfer starts when it is sent, its receive is
    posted and the previous message of its channel (sender, receiver, forward or backward) is complete; it then takes
    `costs.transfer`. Channels do not slow each other down. Communication is added to a schedule that has only compute
    actions.

    Raises:
        ScheduleError: the schedule is not valid.
        ValueError: the costs do not fit the stages, or one is negative.
    """
    if not has_communication(schedule):
        schedule = add_communication(schedule)
    validate(schedule)
    _check_costs(costs, schedule.num_stages)
    clock = _Clock(schedule, costs)
    clock.run()
    spans = sorted(clock.spans, key=lambda span: (span.rank, span.start, span.stop))
    makespan = max(clock.now)
    capacity = makespan * schedule.num_ranks
    bubble = max(0.0, 1.0 - sum(clock.busy) / capacity) if capacity else 0.0
    # Rounding errors of sums are no idle time.
    idle = [
        max(0.0, stop - start - busy) if stop - start - busy > 1e-9 * makespan else 0.0
        for start, stop, busy in zip(clock.first_start, clock.now, clock.busy, strict=True)
    ]
    return Simulation(makespan, bubble, idle, peaks_held(schedule, costs), spans)


class _Clock:
    """The state of the simulation: a clock for each rank and channel, and the ranks that wait for a receive."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule = schedule
        self.costs = costs
        self.now = [0.0] * schedule.num_ranks
        self.first_start = [0.0] * schedule.num_ranks
        self.busy = [0.0] * schedule.num_ranks
        self.spans: list[Span] = []
        self.next_index = [0] * schedule.num_ranks
        self.half_open: dict[Action, tuple[float, int]] = {}  # receive -> (time, rank) of its first end started
        self.arrivals: dict[Action, float] = {}  # receive -> arrival time of its data
        self.channel_free: dict[tuple[int, int, ActionKind], float] = {}
        self.sleepers: dict[Action, int] = {}  # receive -> the rank that waits for it
        self.receives = {
            action for entries in schedule.actions for action in actions_of(entries) if action.kind.is_receive
        }

    def run(self) -> None:
        awake = list(range(self.schedule.num_ranks))
        while awake:
            rank = awake.pop()
            entries = self.schedule.actions[rank]
            while self.next_index[rank] < len(entries):
                entry = entries[self.next_index[rank]]
                if isinstance(entry, Action) and not entry.is_compute:
                    awake += self.start_transfer(rank, entry)
                elif not self.compute(rank, entry):
                    break
                self.next_index[rank] += 1

    def compute(self, rank: int, entry: Entry) -> bool:
        """Runs an entry; returns False when the arrival time of an input is not known yet, and the rank then sleeps."""
        start = self.now[rank]
        for action in entry.parts:
            kind = KINDS[action.kind].receive
            receive = None if kind is None else Action(kind, action.stage, action.microbatch)
            # Between stages of one rank the order of the list is sufficient, as validate has proved.
            if receive is None or receive not in self.receives:
                continue
            if receive not in self.arrivals:
                self.sleepers[receive] = rank
                return False
            start = max(start, self.arrivals[receive])
        if not self.busy[rank]:
            self.first_start[rank] = start
        share = self.costs.overlap if len(entry.parts) > 1 else 1.0
        for action in entry.parts:
            duration = self.costs.times[action.kind][action.stage] * share
            self.spans.append(Span(rank, action, start, start + duration))
            self.busy[rank] += duration
            start += duration
        self.now[rank] = start
        return True

    def start_transfer(self, rank: int, action: Action) -> list[int]:
        """Starts one end of a transfer.

        When both ends are started, sets its arrival and returns the rank to wake, if any.
        """
        is_send = action.kind.is_send
        receive = partner(action) if is_send else action
        if receive not in self.half_open:
            self.half_open[receive] = (self.now[rank], rank)
            return []
        other_start, other_rank = self.half_open.pop(receive)
        sender, receiver = (rank, other_rank) if is_send else (other_rank, rank)
        channel = (sender, receiver, receive.kind)
        start = max(self.now[rank], other_start, self.channel_free.get(channel, 0.0))
        stop = start + self.costs.transfer
        self.channel_free[channel] = self.arrivals[receive] = stop
        if self.costs.transfer > 0:
            self.spans.append(Span(sender, action if is_send else partner(action), start, stop))
        sleeper = self.sleepers.pop(receive, None)
        return [] if sleeper is None else [sleeper]


def peaks_held(schedule: Schedule, costs: Costs) -> list[float]:
    """Return for each rank the most that it holds, as in `Simulation`. It follows from the lists, without their times.

    Raises:
        ValueError: the costs do not fit the stages, or one is negative.
    """
    _check_costs(costs, schedule.num_stages)
    return [_peak_held(entries, costs) for entries in schedule.actions]


def _peak_held(entries: Sequence[Entry], costs: Costs) -> float:
    actions = [action for action in actions_of(entries) if action.is_compute]
    changes = [costs.held[action.kind][action.stage] for action in actions]
    if all(action.kind is _F for action in actions):
        return max(changes, default=0.0)
    return max(accumulate(changes), default=0.0)


def _check_costs(costs: Costs, num_stages: int) -> None:
    for kind in _COMPUTE:
        for what, table in (("times", costs.times), ("held", costs.held)):
            if len(table[kind]) != num_stages:
                raise ValueError(
                    f"costs.{what} of {KINDS[kind].words} has {len(table[kind])} entries, but the schedule has "
                    f"{num_stages} stages; give one per stage"
                )
        for time in costs.times[kind]:
            _check_time(f"times of {KINDS[kind].words}", time)
    _check_time("transfer", costs.transfer)
    _check_time("overlap", costs.overlap)


def _check_time(name: str, time: float) -> None:
    if not 0.0 <= time < float("inf"):
        raise ValueError(f"costs.{name} must be finite and at least 0; got {time}")
