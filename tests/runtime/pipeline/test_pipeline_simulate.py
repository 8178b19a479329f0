"""The simulator against closed forms of the papers and against small schedules worked out by hand."""

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from trimaran.runtime.pipeline.action import Action, ActionKind, actions_of, parse_entry
from trimaran.runtime.pipeline.passes import ScheduleError, add_communication, partner, peer_rank
from trimaran.runtime.pipeline.schedule import (
    Schedule,
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    parse_schedule,
    round_robin,
    v_shape,
)
from trimaran.runtime.pipeline.schedules import build_schedule
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
    assert simulate(one_f_one_b(p, m), Costs.uniform(p)).peak_held == [min(m, p - rank) for rank in range(p)]
    assert simulate(gpipe(p, m), Costs.uniform(p)).peak_held == [m] * p


def test_interleaving_holds_its_warmup_and_one_more_in_flight() -> None:
    p, m, v = 4, 8, 2
    peaks = simulate(interleaved_1f1b(p, m, v), Costs.uniform(p * v)).peak_held
    assert peaks == [min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) for rank in range(p)]


def test_forward_only_holds_one_microbatch_and_fills_once() -> None:
    result = simulate(forward_only(round_robin(4), 6), Costs.uniform(4))
    assert result.makespan == 6 + 3
    assert result.peak_held == [1, 1, 1, 1]


def test_makespan_follows_the_slowest_stage() -> None:
    # Stage 1 takes 3 + 6 for each of the 8 microbatches; stage 0 adds one forward before it and one backward after.
    result = simulate(one_f_one_b(2, 8), Costs.of_stages([1.0, 3.0], [2.0, 6.0]))
    assert result.makespan == 1 + 8 * 9 + 2
    assert result.bubble == pytest.approx(1 - (8 * 9 + 8 * 3) / (2 * 75))


def test_a_chain_without_overlap_pays_every_transfer() -> None:
    result = simulate(one_f_one_b(4, 1), Costs.uniform(4, 1.0, 2.0, transfer=0.5))
    assert result.makespan == 4 * 3 + 6 * 0.5


def test_transfers_overlap_compute() -> None:
    # Three messages of 0.5 leave rank 0 while it computes; only the first one's time shows.
    result = simulate(forward_only(round_robin(2), 3), Costs.uniform(2, 1.0, transfer=0.5))
    assert result.makespan == 1 + 0.5 + 3
    wires = [
        (span.rank, str(span.action), span.start, span.stop) for span in result.spans if not span.action.kind.is_compute
    ]
    assert wires == [(0, "0SEND_F0", 1.0, 1.5), (0, "0SEND_F1", 2.0, 2.5), (0, "0SEND_F2", 3.0, 3.5)]


def test_messages_of_one_channel_queue_behind_each_other() -> None:
    # A transfer of 2 is slower than a compute of 1, so the link sets the pace: arrivals at 3, 5, 7.
    result = simulate(forward_only(round_robin(2), 3), Costs.uniform(2, 1.0, transfer=2.0))
    assert [span.start for span in result.spans if span.rank == 1] == [3.0, 5.0, 7.0]


def test_a_transfer_waits_for_its_receive_to_be_posted() -> None:
    # Rank 1 posts its second receive only after computing the first, at 1 + 1 + 4.
    schedule = parse_schedule("0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1F0 1RECV_F1 1F1")
    result = simulate(schedule, Costs.of_stages([1.0, 4.0], [0.0, 0.0], transfer=1.0))
    assert [span.start for span in result.spans if span.rank == 1] == [2.0, 7.0]


def test_a_schedule_with_and_without_communication_costs_the_same() -> None:
    schedule, costs = interleaved_1f1b(4, 8, 2), Costs.uniform(8, transfer=0.3)
    assert simulate(schedule, costs) == simulate(add_communication(schedule), costs)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_spans_obey_the_data_and_never_overlap_on_a_rank(name: str) -> None:
    v = 2 if name == "interleaved_1f1b" else 1
    costs = Costs.of_stages([1.0 + 0.3 * s for s in range(3 * v)], [2.5 - 0.2 * s for s in range(3 * v)], transfer=0.4)
    schedule = build_schedule(name, 3, 6, v)
    spans = [span for span in simulate(schedule, costs).spans if span.action.kind.is_compute]
    at = {(span.action.kind, span.action.stage, span.action.microbatch): span for span in spans}
    assert len(at) == len(spans) == 2 * 3 * v * 6
    for (kind, stage, m), span in at.items():
        source = stage - 1 if kind is ActionKind.F else stage + 1
        if (kind, source, m) in at:
            assert span.start >= at[kind, source, m].stop + 0.4 - 1e-12
    for rank, entries in enumerate(schedule.actions):
        mine = [span for span in spans if span.rank == rank]
        assert [span.action for span in mine] == actions_of(entries)
        assert all(before.stop <= after.start for before, after in itertools.pairwise(mine))


def test_an_invalid_schedule_is_not_simulated() -> None:
    with pytest.raises(ScheduleError):
        simulate(parse_schedule("0B0 0F0"), Costs.uniform(1))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs.of_stages([1.0], [2.0, 2.0]), r"costs.times of forward has 1 entries, but the schedule has 2 stages"),
        (Costs.of_stages([1.0, 1.0], [2.0]), "costs.times of backward has 1 entries"),
        (Costs.of_stages([1.0, -1.0], [2.0, 2.0]), "at least 0; got -1.0"),
        (Costs.of_stages([1.0, 1.0], [2.0, float("nan")]), "finite"),
        (Costs.of_stages([1.0, 1.0], [2.0, 2.0], transfer=-0.1), "costs.transfer"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: Costs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(one_f_one_b(2, 2), costs)


def test_free_stages_have_no_bubble() -> None:
    result = simulate(one_f_one_b(2, 2), Costs.uniform(2, 0.0, 0.0))
    assert (result.makespan, result.bubble) == (0.0, 0.0)


def test_64_ranks_and_256_microbatches_take_seconds() -> None:
    began = time.process_time()
    schedule = add_communication(one_f_one_b(64, 256))
    result = simulate(schedule, Costs.uniform(64, transfer=0.01))  # validates first
    # About 1.5 s on the machine this was written on; the bound catches a quadratic pass.
    assert time.process_time() - began < 10
    assert result.peak_held == [64 - rank for rank in range(64)]


Link = tuple[int, int, bool]
"""(source, target, forward)."""


def stuck_at_first_use(schedule: Schedule, connected: set[Link]) -> list[str]:
    """Play the lists where the first transfer over a link holds the host until the other end is there, as NCCL does.

    Compute holds it until its input is there, as experts do. Return what the ranks that never end are held by.
    """
    schedule, connected = add_communication(schedule), set(connected)
    size, sent = schedule.num_ranks, set[Action]()
    position, lists = [0] * size, [actions_of(entries) for entries in schedule.actions]
    top = schedule.num_stages - 1

    def link(action: Action, rank: int) -> Link:
        pair = (rank, peer_rank(action, schedule.placement))
        is_send = action.kind in (ActionKind.SEND_F, ActionKind.SEND_B)
        return (*(pair if is_send else pair[::-1]), action.kind in (ActionKind.SEND_F, ActionKind.RECV_F))

    def current(rank: int) -> Action | None:
        return lists[rank][position[rank]] if position[rank] < len(lists[rank]) else None

    def may_go_on(rank: int, action: Action) -> bool:
        if not action.kind.is_compute:
            mine, theirs = link(action, rank), current(peer_rank(action, schedule.placement))
            if (
                theirs is not None
                and not theirs.kind.is_compute
                and link(theirs, peer_rank(action, schedule.placement)) == mine
            ):
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
        schedule = forward_only(round_robin(p, v), m) if name == "forward_only" else build_schedule(name, p, m, v)
        assert stuck_at_first_use(schedule, links) == []
        if name == "gpipe":
            assert stuck_at_first_use(schedule, set()), "links that connect at their first use hold this schedule"
    if name == "interleaved_1f1b" and p > 2:
        assert stuck_at_first_use(build_schedule(name, p, p, v), set())


# ---------------------------------------------------------------- split backwards


def figures(schedule: Schedule, costs: Costs) -> tuple[float, float, float]:
    """(makespan, the longest idle time inside a rank's span, the most that a rank holds)."""
    result = simulate(schedule, costs)
    return result.makespan, max(result.idle), max(result.peak_held)


@pytest.mark.parametrize(
    ("name", "v", "expected"),
    [
        ("1f1b", 1, (33, 9, 4)),
        ("zb_h1", 1, (27, 3, 4)),
        ("zb_h2", 1, (27, 0, 7)),
        ("interleaved_1f1b", 2, (57, 9, 11)),
        ("zbv", 2, (51, 0, 8)),
        ("dualpipev", 2, (54, 6, 9)),
    ],
)
def test_four_ranks_and_eight_microbatches_of_equal_actions(
    name: str, v: int, expected: tuple[float, float, float]
) -> None:
    """F = I = W = 1, an overlap lasts F + B; with two stages a rank in units of one stage."""
    assert figures(build_schedule(name, 4, 8, v), Costs.uniform(4 * v)) == expected


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_idle_times_are_the_papers(p: int) -> None:
    for forward, inputs, weights in ((1.0, 1.0, 1.0), (1.0, 1.5, 0.5), (2.0, 3.0, 1.0), (1.0, 1.2, 0.8)):
        backward = inputs + weights
        one, two = (
            Costs.of_stages([forward] * p * v, [backward] * p * v, [weights] * p * v, overlap=0.9) for v in (1, 2)
        )
        for m in (2 * p, 2 * p + 1, 3 * p):
            idle = {name: figures(build_schedule(name, p, m, 1, one), one)[1] for name in ("1f1b", "zb_h1", "zb_h2")}
            assert idle["1f1b"] == pytest.approx((p - 1) * (forward + backward))
            assert idle["zb_h1"] == pytest.approx((p - 1) * (forward + inputs - weights))
            assert idle["zb_h2"] == pytest.approx((p - 1) * (forward + inputs - 2 * weights))
            if weights == inputs:
                assert figures(build_schedule("zbv", p, m, 2, two), two)[1] == pytest.approx(0)
                overlap = 0.9 * (forward + backward)
                most = (p - 1) * (overlap + backward - 3 * weights)
                assert figures(build_schedule("dualpipev", p, m, 2, two), two)[1] <= most + 1e-9
                whole = replace(two, overlap=1.0)
                expected = (p - 1) * (forward + 2 * backward - 3 * weights)
                assert figures(build_schedule("dualpipev", p, m, 2), whole)[1] == pytest.approx(expected)


def list_of_torch(kind: type, num_ranks: int, num_microbatches: int) -> Schedule:
    """The list of torch's schedule over two stages a rank in the shape of a V."""
    theirs: Any = object.__new__(kind)
    theirs.pp_group_size, theirs.num_stages = num_ranks, 2 * num_ranks
    theirs._n_microbatches = num_microbatches
    lists = [theirs._calculate_single_rank_operations(rank) for rank in range(num_ranks)]
    entries = tuple(tuple(parse_entry(str(action)) for action in each if action is not None) for each in lists)
    return Schedule(v_shape(num_ranks), entries)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 11), (6, 12)])
def test_lists_of_torch_give_the_same_figures(p: int, m: int) -> None:
    costs = Costs.uniform(2 * p)
    theirs = list_of_torch(torch_schedules.ScheduleDualPipeV, p, m)
    assert build_schedule("dualpipev", p, m, 2) == theirs
    theirs = list_of_torch(torch_schedules.ScheduleZBVZeroBubble, p, m)
    assert figures(build_schedule("zbv", p, m, 2), costs) == figures(theirs, costs)


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "zbv"])
def test_a_planned_schedule_takes_what_its_stages_cost(name: str) -> None:
    """A stage of twice the cost: weight gradients are woven in where its neighbours wait."""
    v = 2 if name == "zbv" else 1
    forward = [1.0] * 4 * v
    forward[1] = 2.0
    costs = Costs.of_stages(forward, [2 * each for each in forward])
    planned = simulate(build_schedule(name, 4, 12, v, costs), costs)
    blind = simulate(build_schedule(name, 4, 12, v), costs)
    assert planned.makespan <= blind.makespan
    assert max(planned.peak_held) <= {"zb_h1": 4, "zb_h2": 7, "zbv": 8}[name]
