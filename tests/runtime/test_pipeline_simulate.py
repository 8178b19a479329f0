"""The simulator against closed forms of the papers and against small schedules worked out by hand."""

import itertools
import time

import pytest

from trimaran.runtime.pipeline.passes import ScheduleError, add_communication, partner, peer_rank
from trimaran.runtime.pipeline.schedule import (
    Action,
    ActionKind,
    Schedule,
    build_schedule,
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    parse_schedule,
)
from trimaran.runtime.pipeline.simulate import Costs, simulate


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 4), (2, 1), (4, 2), (4, 8), (8, 8), (5, 13)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_equal_stages_is_the_closed_form(name: str, p: int, m: int) -> None:
    result = simulate(build_schedule(name, p, m), Costs.uniform(p, forward=1.5, backward=3.0))
    assert result.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert result.makespan == pytest.approx((m + p - 1) * 4.5)


def test_bubble_of_four_ranks_and_eight_microbatches() -> None:
    assert simulate(one_f_one_b(4, 8), Costs.uniform(4)).bubble == pytest.approx(0.2727, abs=5e-5)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 2, 2), (4, 4, 2), (4, 8, 2), (4, 16, 3), (8, 16, 4), (1, 3, 2)])
def test_interleaving_divides_the_bubble_time_by_the_chunks(p: int, m: int, v: int) -> None:
    result = simulate(interleaved_1f1b(p, m, v), Costs.uniform(p * v, forward=1 / v, backward=2 / v))
    assert result.bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
    assert result.makespan == pytest.approx(3 * (m + (p - 1) / v))


@pytest.mark.parametrize(("p", "m"), [(1, 3), (4, 2), (4, 8), (8, 5)])
def test_microbatches_in_flight_are_bounded_by_depth_in_1f1b_and_not_in_gpipe(p: int, m: int) -> None:
    assert simulate(one_f_one_b(p, m), Costs.uniform(p)).peak_in_flight == [min(m, p - rank) for rank in range(p)]
    assert simulate(gpipe(p, m), Costs.uniform(p)).peak_in_flight == [m] * p


def test_interleaving_holds_its_warmup_and_one_more_in_flight() -> None:
    p, m, v = 4, 8, 2
    peaks = simulate(interleaved_1f1b(p, m, v), Costs.uniform(p * v)).peak_in_flight
    assert peaks == [min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) for rank in range(p)]


def test_forward_only_holds_one_microbatch_and_fills_once() -> None:
    result = simulate(forward_only(4, 6), Costs.uniform(4))
    assert result.makespan == 6 + 3
    assert result.peak_in_flight == [1, 1, 1, 1]


def test_makespan_follows_the_slowest_stage() -> None:
    # Stage 1 takes 3 + 6 for each of the 8 microbatches; stage 0 adds one forward before it and one backward after.
    result = simulate(one_f_one_b(2, 8), Costs([1.0, 3.0], [2.0, 6.0]))
    assert result.makespan == 1 + 8 * 9 + 2
    assert result.bubble == pytest.approx(1 - (8 * 9 + 8 * 3) / (2 * 75))


def test_a_chain_without_overlap_pays_every_transfer() -> None:
    result = simulate(one_f_one_b(4, 1), Costs.uniform(4, 1.0, 2.0, transfer=0.5))
    assert result.makespan == 4 * 3 + 6 * 0.5


def test_transfers_overlap_compute() -> None:
    # Three messages of 0.5 leave rank 0 while it computes; only the first one's time shows.
    result = simulate(forward_only(2, 3), Costs.uniform(2, 1.0, transfer=0.5))
    assert result.makespan == 1 + 0.5 + 3
    wires = [
        (span.rank, str(span.action), span.start, span.stop) for span in result.spans if not span.action.kind.is_compute
    ]
    assert wires == [(0, "0SEND_F0", 1.0, 1.5), (0, "0SEND_F1", 2.0, 2.5), (0, "0SEND_F2", 3.0, 3.5)]


def test_messages_of_one_channel_queue_behind_each_other() -> None:
    # A transfer of 2 is slower than a compute of 1, so the link sets the pace: arrivals at 3, 5, 7.
    result = simulate(forward_only(2, 3), Costs.uniform(2, 1.0, transfer=2.0))
    assert [span.start for span in result.spans if span.rank == 1] == [3.0, 5.0, 7.0]


def test_a_transfer_waits_for_its_receive_to_be_posted() -> None:
    # Rank 1 posts its second receive only after computing the first, at 1 + 1 + 4.
    schedule = parse_schedule("0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1F0 1RECV_F1 1F1")
    result = simulate(schedule, Costs([1.0, 4.0], [0.0, 0.0], transfer=1.0))
    assert [span.start for span in result.spans if span.rank == 1] == [2.0, 7.0]


def test_a_schedule_with_and_without_communication_costs_the_same() -> None:
    schedule, costs = interleaved_1f1b(4, 8, 2), Costs.uniform(8, transfer=0.3)
    assert simulate(schedule, costs) == simulate(add_communication(schedule), costs)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_spans_obey_the_data_and_never_overlap_on_a_rank(name: str) -> None:
    v = 2 if name == "interleaved_1f1b" else 1
    costs = Costs([1.0 + 0.3 * s for s in range(3 * v)], [2.5 - 0.2 * s for s in range(3 * v)], transfer=0.4)
    schedule = build_schedule(name, 3, 6, v)
    spans = [span for span in simulate(schedule, costs).spans if span.action.kind.is_compute]
    at = {(span.action.kind, span.action.stage, span.action.microbatch): span for span in spans}
    assert len(at) == len(spans) == 2 * 3 * v * 6
    for (kind, stage, m), span in at.items():
        source = stage - 1 if kind is ActionKind.F else stage + 1
        if (kind, source, m) in at:
            assert span.start >= at[kind, source, m].stop + 0.4 - 1e-12
    for rank, actions in enumerate(schedule):
        mine = [span for span in spans if span.rank == rank]
        assert [span.action for span in mine] == actions
        assert all(before.stop <= after.start for before, after in itertools.pairwise(mine))


def test_an_invalid_schedule_is_not_simulated() -> None:
    with pytest.raises(ScheduleError):
        simulate(parse_schedule("0B0 0F0"), Costs.uniform(1))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs([1.0], [2.0, 2.0]), r"costs.forward has 1 entries, but the schedule has 2 stages"),
        (Costs([1.0, 1.0], [2.0]), "costs.backward has 1 entries"),
        (Costs([1.0, -1.0], [2.0, 2.0]), "at least 0; got -1.0"),
        (Costs([1.0, 1.0], [2.0, float("nan")]), "finite"),
        (Costs([1.0, 1.0], [2.0, 2.0], transfer=-0.1), "costs.transfer"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: Costs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(one_f_one_b(2, 2), costs)


def test_free_stages_have_no_bubble() -> None:
    result = simulate(one_f_one_b(2, 2), Costs.uniform(2, 0.0, 0.0))
    assert (result.makespan, result.bubble) == (0.0, 0.0)


def test_64_ranks_and_512_microbatches_take_seconds() -> None:
    began = time.process_time()
    schedule = add_communication(one_f_one_b(64, 512))
    result = simulate(schedule, Costs.uniform(64, transfer=0.01))  # validates first
    assert (
        time.process_time() - began < 20
    )  # about 3 s on the machine this was written on; the bound catches a quadratic pass
    assert result.peak_in_flight == [64 - rank for rank in range(64)]


Link = tuple[int, int, bool]
"""(source, target, forward)."""


def stuck_at_first_use(schedule: Schedule, connected: set[Link]) -> list[str]:
    """Play the lists where the first transfer over a link holds the host until the other end is there, as NCCL does.

    Compute holds it until its input is there, as experts do. Return what the ranks that never end are held by.
    """
    schedule, connected = add_communication(schedule), set(connected)
    size, position, sent = len(schedule), [0] * len(schedule), set[Action]()
    top = max(action.stage for actions in schedule for action in actions)

    def link(action: Action, rank: int) -> Link:
        pair = (rank, peer_rank(action, size))
        is_send = action.kind in (ActionKind.SEND_F, ActionKind.SEND_B)
        return (*(pair if is_send else pair[::-1]), action.kind in (ActionKind.SEND_F, ActionKind.RECV_F))

    def current(rank: int) -> Action | None:
        return schedule[rank][position[rank]] if position[rank] < len(schedule[rank]) else None

    def may_go_on(rank: int, action: Action) -> bool:
        if not action.kind.is_compute:
            mine, theirs = link(action, rank), current(peer_rank(action, size))
            if theirs is not None and not theirs.kind.is_compute and link(theirs, peer_rank(action, size)) == mine:
                connected.add(mine)
            return mine in connected
        receive = ActionKind.RECV_F if action.kind is ActionKind.F else ActionKind.RECV_B
        has_input = action.stage > 0 if action.kind is ActionKind.F else action.stage < top
        return not has_input or partner(Action(receive, action.stage, action.microbatch)) in sent

    moved = True
    while moved:
        moved = False
        for rank in range(size):
            while (action := current(rank)) is not None and may_go_on(rank, action):
                sent.add(action)
                position[rank] += 1
                moved = True
    return [f"rank {rank}: {action}" for rank in range(size) if (action := current(rank)) is not None]


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize(("name", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("forward_only", 2)])
def test_no_schedule_is_held_by_links_that_are_connected_before(name: str, v: int, p: int) -> None:
    """`build_mesh` connects every link of the ring before the first step."""
    links = {(i, (i + 1) % p, True) for i in range(p)} | {((i + 1) % p, i, False) for i in range(p)}
    for m in (p, 2 * p, 4 * p):
        schedule = forward_only(p, m, v) if name == "forward_only" else build_schedule(name, p, m, v)
        assert stuck_at_first_use(schedule, links) == []
        if name == "gpipe":
            assert stuck_at_first_use(schedule, set()), "links that connect at their first use hold this schedule"
    if name == "interleaved_1f1b" and p > 2:
        assert stuck_at_first_use(build_schedule(name, p, p, v), set())
