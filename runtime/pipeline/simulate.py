"""What a schedule costs, without running it: makespan, bubble, microbatches in flight, and the spans to draw.

Times have the unit of the costs; give milliseconds, because `draw` labels its axis so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimaran.runtime.pipeline.passes import add_communication, has_communication, partner, validate
from trimaran.runtime.pipeline.schedule import Action, ActionKind

# In Python 3.11 an enum member lookup costs more than the rest of a loop over actions.
_F, _B, _SEND_F, _RECV_F, _SEND_B, _RECV_B = ActionKind


@dataclass(frozen=True, slots=True)
class Costs:
    """Times of one microbatch, in milliseconds.

    Attributes:
        forward: forward time, one entry per stage (all stages of the pipeline, in order).
        backward: backward time, one entry per stage.
        transfer: time of one message between two ranks, forward or backward.
    """

    forward: list[float]
    backward: list[float]
    transfer: float = 0.0

    @staticmethod
    def uniform(num_stages: int, forward: float = 1.0, backward: float = 2.0, transfer: float = 0.0) -> "Costs":
        """Equal stages. A backward has two matrix products for each one of the forward, so it takes twice the time."""
        return Costs([forward] * num_stages, [backward] * num_stages, transfer)


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
        bubble: share of makespan in which a rank does not compute, averaged over ranks, in [0, 1).
        peak_in_flight: for each rank, the most (stage, microbatch) forwards started whose backward had not finished; in
            a forward-only schedule only the running one counts, since none waits for a backward.
        spans: of compute, and of transfers where they take time; ordered by rank, then start.
    """

    makespan: float
    bubble: float
    peak_in_flight: list[int]
    spans: list[Span]


def simulate(schedule: Sequence[Sequence[Action]], costs: Costs) -> Simulation:
    """Play `schedule` as the executor does and time it.

    A rank computes one action at a time. Sends overlap compute: a transfer starts when it is sent, its receive is
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
    _check_costs(costs, 1 + max(action.stage for actions in schedule for action in actions))
    clock = _Clock(schedule, costs)
    clock.run()
    spans = sorted(clock.spans, key=lambda span: (span.rank, span.start, span.stop))
    makespan = max(clock.now)
    capacity = makespan * len(schedule)
    bubble = max(0.0, 1.0 - sum(clock.busy) / capacity) if capacity else 0.0
    return Simulation(makespan, bubble, [_peak_in_flight(actions) for actions in schedule], spans)


class _Clock:
    """The state of the simulation: a clock for each rank and channel, and the ranks that wait for a receive."""

    def __init__(self, schedule: Sequence[Sequence[Action]], costs: Costs) -> None:
        self.schedule = schedule
        self.costs = costs
        self.now = [0.0] * len(schedule)
        self.busy = [0.0] * len(schedule)
        self.spans: list[Span] = []
        self.next_index = [0] * len(schedule)
        self.half_open: dict[Action, tuple[float, int]] = {}  # receive -> (time, rank) of its first end started
        self.arrivals: dict[Action, float] = {}  # receive -> arrival time of its data
        self.channel_free: dict[tuple[int, int, ActionKind], float] = {}
        self.sleepers: dict[Action, int] = {}  # receive -> the rank that waits for it
        last_stage = max(action.stage for actions in schedule for action in actions)
        self.first_and_last = (0, last_stage)

    def run(self) -> None:
        awake = list(range(len(self.schedule)))
        while awake:
            rank = awake.pop()
            actions = self.schedule[rank]
            while self.next_index[rank] < len(actions):
                action = actions[self.next_index[rank]]
                if not action.kind.is_compute:
                    awake += self.start_transfer(rank, action)
                elif not self.compute(rank, action):
                    break
                self.next_index[rank] += 1

    def compute(self, rank: int, action: Action) -> bool:
        """Runs F or B; returns False when the arrival time of its input is not known yet, and the rank then sleeps."""
        forward = action.kind is _F
        start = self.now[rank]
        # Between stages of one rank the order of the list is sufficient, as validate has proved.
        if len(self.schedule) > 1 and action.stage != self.first_and_last[0 if forward else 1]:
            receive = Action(_RECV_F if forward else _RECV_B, action.stage, action.microbatch)
            if receive not in self.arrivals:
                self.sleepers[receive] = rank
                return False
            start = max(start, self.arrivals[receive])
        duration = (self.costs.forward if forward else self.costs.backward)[action.stage]
        self.now[rank] = start + duration
        self.busy[rank] += duration
        self.spans.append(Span(rank, action, start, start + duration))
        return True

    def start_transfer(self, rank: int, action: Action) -> list[int]:
        """Starts one end of a transfer.

        When both ends are started, sets its arrival and returns the rank to wake, if any.
        """
        is_send = action.kind is _SEND_F or action.kind is _SEND_B
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


def _peak_in_flight(actions: Sequence[Action]) -> int:
    if not any(a.kind is _B for a in actions):
        return min(1, len(actions))
    in_flight = peak = 0
    for action in actions:
        in_flight += (action.kind is _F) - (action.kind is _B)
        peak = max(peak, in_flight)
    return peak


def _check_costs(costs: Costs, num_stages: int) -> None:
    for name, times in (("forward", costs.forward), ("backward", costs.backward)):
        if len(times) != num_stages:
            raise ValueError(
                f"costs.{name} has {len(times)} entries, but the schedule has {num_stages} "
                "stages; give one time per stage"
            )
    for name, value in (
        [("forward", t) for t in costs.forward]
        + [("backward", t) for t in costs.backward]
        + [("transfer", costs.transfer)]
    ):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"costs.{name} must be finite and at least 0; got {value}")
