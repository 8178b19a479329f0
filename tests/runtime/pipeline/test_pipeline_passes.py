"""Communication is complete and overlaps; validate accepts exactly the schedules that run."""

import pickle
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.runtime.pipeline.action import Action, ActionKind, actions_of
from trimaran.runtime.pipeline.passes import ScheduleError, add_communication, partner, peer_rank, validate
from trimaran.runtime.pipeline.schedule import (
    Schedule,
    format_schedule,
    forward_only,
    one_f_one_b,
    parse_schedule,
    round_robin,
)
from trimaran.runtime.pipeline.schedules import build_schedule
from trimaran.runtime.pipeline.simulate import Costs, simulate

SHAPES = [
    ("gpipe", 1, 1, 1),
    ("gpipe", 4, 2, 1),
    ("gpipe", 3, 4, 1),
    ("1f1b", 1, 3, 1),
    ("1f1b", 2, 3, 1),
    ("1f1b", 4, 2, 1),
    ("1f1b", 4, 6, 1),
    ("interleaved_1f1b", 1, 2, 2),
    ("interleaved_1f1b", 2, 4, 2),
    ("interleaved_1f1b", 3, 3, 3),
    ("zb_h1", 3, 4, 1),
    ("zb_h2", 4, 5, 1),
    ("zbv", 1, 2, 2),
    ("zbv", 3, 6, 2),
    ("zbv", 4, 3, 2),
    ("dualpipev", 1, 2, 2),
    ("dualpipev", 3, 7, 2),
    ("forward_only", 2, 3, 1),
    ("forward_only", 3, 4, 2),
]


def _communicated(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    if name == "forward_only":
        return add_communication(forward_only(round_robin(num_ranks, virtual_stages), num_microbatches))
    return add_communication(build_schedule(name, num_ranks, num_microbatches, virtual_stages))


def _runs(schedule: Schedule, num_microbatches: int, rng: random.Random) -> bool:
    """Executes the lists on symbolic data and tells whether the whole batch came out: what validate is tested against.

    Ranks take turns at random. Channels are queues: the k-th posted receive gets the k-th message sent, whatever it is;
    computing on anything but the neighbour's tensor of the same microbatch is a failure. An entry runs when all of its
    actions can.
    """
    num_ranks, placement = schedule.num_ranks, schedule.placement
    sent: dict[tuple[int, int, str], list[tuple[str, int, int]]] = {}
    posted: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    made: Counter[tuple[str, int, int]] = Counter()  # "B" is the input gradient, "W" the weight gradients
    used: Counter[tuple[str, int, int]] = Counter()
    position = [0] * num_ranks

    def outcome_of(rank: int, action: Action) -> str:
        name, stage, m = action.kind.value, action.stage, action.microbatch
        if not 0 <= stage < len(placement) or placement[stage] != rank or not 0 <= m < num_microbatches:
            return "wrong"
        direction = "F" if name.endswith("F") else "B"
        source, target = (stage - 1, stage + 1) if direction == "F" else (stage + 1, stage - 1)
        if name == "W":
            return "ran" if made["I", stage, m] else "wrong"
        if name.startswith("SEND"):
            there = 0 <= target < len(placement) and placement[target] != rank
            return "ran" if there and made[direction, stage, m] else "wrong"
        channel = (placement[source] if 0 <= source < len(placement) else -1, rank, direction)
        if name.startswith("RECV"):
            return "ran" if 0 <= source < len(placement) else "wrong"
        if direction == "B" and not made["F", stage, m]:
            return "wrong"
        if 0 <= source < len(placement):
            if placement[source] == rank:
                return "ran" if made[direction, source, m] else "wrong"
            if (stage, m) not in posted.get(channel, []):
                return "wrong"
            slot = posted[channel].index((stage, m))
            if slot >= len(sent.get(channel, [])):
                return "waits"
            if sent[channel][slot] != (direction, source, m):
                return "wrong"
        return "ran"

    def run(rank: int, action: Action) -> None:
        name, stage, m = action.kind.value, action.stage, action.microbatch
        direction = "F" if name.endswith("F") else "B"
        source, target = (stage - 1, stage + 1) if direction == "F" else (stage + 1, stage - 1)
        if name.startswith("SEND"):
            sent.setdefault((rank, placement[target], direction), []).append((direction, stage, m))
        elif name.startswith("RECV"):
            posted.setdefault((placement[source], rank, direction), []).append((stage, m))
        elif name == "W":
            made["W", stage, m] += 1
        else:
            made[direction, stage, m] += 1
            if name != "F":
                made["W" if name == "B" else "I", stage, m] += 1
            if 0 <= source < len(placement) and placement[source] != rank:
                used[direction, stage, m] += 1

    while True:
        moved = False
        for rank in rng.sample(range(num_ranks), num_ranks):
            while position[rank] < len(schedule.actions[rank]):
                parts = schedule.actions[rank][position[rank]].parts
                outcomes = {outcome_of(rank, action) for action in parts}
                if "wrong" in outcomes:
                    return False
                if "waits" in outcomes:
                    break
                for action in parts:
                    run(rank, action)
                position[rank] += 1
                moved = True
        if not moved:
            break
    names = {action.kind.value for entries in schedule.actions for action in actions_of(entries)}
    kinds = ["F", "B", "W"] if names & {"B", "I", "W", "SEND_B", "RECV_B"} else ["F"]
    everything = Counter(
        {(kind, stage, m): 1 for kind in kinds for stage in range(len(placement)) for m in range(num_microbatches)}
    )
    receives = Counter((channel[2], *slot) for channel, slots in posted.items() for slot in slots)
    return (
        all(position[rank] == len(entries) for rank, entries in enumerate(schedule.actions))
        and Counter({key: count for key, count in made.items() if key[0] != "I"}) == everything
        and receives == used
        and {channel: len(messages) for channel, messages in sent.items()}
        == {channel: len(slots) for channel, slots in posted.items()}
    )


def _mutate(schedule: Schedule, rng: random.Random) -> Schedule:
    mutant = [list(entries) for entries in schedule.actions]
    rank = rng.choice([rank for rank, entries in enumerate(mutant) if entries])
    entries = mutant[rank]
    index, other = rng.randrange(len(entries)), rng.randrange(len(entries))
    match rng.choice(["swap", "neighbours", "drop", "duplicate", "move", "other rank", "relabel", "split"]):
        case "swap":
            entries[index], entries[other] = entries[other], entries[index]
        case "neighbours":
            other = max(0, index - 1)
            entries[index], entries[other] = entries[other], entries[index]
        case "drop":
            del entries[index]
        case "duplicate":
            entries.insert(other, entries[index])
        case "move":
            entries.insert(other, entries.pop(index))
        case "other rank":
            target = rng.choice(mutant)
            target.insert(rng.randint(0, len(target)), entries.pop(index))
        case "relabel":
            old = entries[index].parts[0]
            entries[index] = rng.choice(
                [
                    Action(rng.choice(list(ActionKind)), old.stage, old.microbatch),
                    Action(old.kind, old.stage + rng.choice([-1, 1]), old.microbatch),
                    Action(old.kind, old.stage, old.microbatch + rng.choice([-1, 1])),
                ]
            )
        case "split":
            old = entries[index].parts[-1]
            if old.kind is ActionKind.B:
                entries[index : index + 1] = [
                    Action(kind, old.stage, old.microbatch) for kind in (ActionKind.I, ActionKind.W)
                ]
    return Schedule(schedule.placement, tuple(tuple(entries) for entries in mutant))


def _is_accepted(schedule: Schedule, num_microbatches: int) -> bool:
    try:
        validate(schedule, num_microbatches=num_microbatches)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_schedules_are_valid_and_run(shape: tuple[str, int, int, int]) -> None:
    _, num_ranks, num_microbatches, virtual_stages = shape
    schedule = _communicated(*shape)
    validate(schedule)
    validate(schedule, num_stages=num_ranks * virtual_stages, num_microbatches=num_microbatches)
    assert _runs(schedule, num_microbatches, random.Random(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_validate_accepts_a_mutated_schedule_exactly_when_it_runs(shape: tuple[str, int, int, int]) -> None:
    _, _, num_microbatches, _ = shape
    rng = random.Random(f"{shape}")
    schedule = _communicated(*shape)
    verdicts = Counter[bool]()
    for _ in range(200):
        mutant = schedule
        for _ in range(rng.choice([1, 1, 2, 3])):
            if any(mutant.actions):
                mutant = _mutate(mutant, rng)
        expected = _runs(mutant, num_microbatches, rng)
        assert _is_accepted(mutant, num_microbatches) == expected, format_schedule(mutant)
        verdicts[expected] += 1
    assert verdicts[False] > 25, "the mutations were too tame to test anything"


@st.composite
def _valid_lists(draw: st.DrawFn) -> tuple[Schedule, int]:
    """A schedule of any placement whose actions are drawn in an order in which each has what it needs."""
    num_ranks, num_microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rest = draw(st.lists(st.integers(0, num_ranks - 1), max_size=4))
    placement = tuple(draw(st.permutations([*range(num_ranks), *rest])))
    splits, last = draw(st.booleans()), len(placement) - 1
    lists: list[list[Action]] = [[] for _ in range(num_ranks)]
    ready = [Action(ActionKind.F, 0, m) for m in range(num_microbatches)]
    back = ActionKind.I if splits else ActionKind.B
    while ready:
        action = ready.pop(draw(st.integers(0, len(ready) - 1)))
        lists[placement[action.stage]].append(action)
        stage, m = action.stage, action.microbatch
        if action.kind is ActionKind.F:
            ready.append(Action(ActionKind.F, stage + 1, m) if stage < last else Action(back, stage, m))
        elif action.kind is back:
            ready += [Action(back, stage - 1, m)] * (stage > 0) + [Action(ActionKind.W, stage, m)] * splits
    return Schedule(placement, tuple(map(tuple, lists))), num_microbatches


@settings(max_examples=60, deadline=None)
@given(_valid_lists(), st.randoms(use_true_random=False))
def test_no_valid_list_deadlocks(drawn: tuple[Schedule, int], rng: random.Random) -> None:
    lists, num_microbatches = drawn
    schedule = add_communication(lists)
    validate(schedule, num_microbatches=num_microbatches)
    assert _runs(schedule, num_microbatches, rng)
    assert simulate(schedule, Costs.uniform(len(schedule.placement))).makespan > 0


def test_communication_of_two_ranks_reads_as_expected() -> None:
    text = format_schedule(add_communication(one_f_one_b(2, 2)))
    assert text.splitlines() == [
        "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1",
        # Its first receive is directly before its use, every other one a compute action ahead.
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_sends_follow_their_compute_and_receives_lead_by_one_compute_entry(shape: tuple[str, int, int, int]) -> None:
    for entries in _communicated(*shape).actions:
        compute = [entry for entry in entries if entry.is_compute]
        for index, entry in enumerate(entries):
            if entry.is_compute:
                continue
            (action,) = entry.parts
            name, _, direction = action.kind.value.partition("_")
            kinds = "F" if direction == "F" else "BI"
            same = [Action(ActionKind(kind), action.stage, action.microbatch) for kind in kinds]
            if name == "SEND":
                maker = next(before for before in reversed(entries[:index]) if before.is_compute)
                assert any(each in maker.parts for each in same)
            else:
                user = next(number for number, each in enumerate(compute) if any(part in same for part in each.parts))
                num_computed = sum(before.is_compute for before in entries[:index])
                assert num_computed == max(0, user - 1)


def test_receives_are_posted_in_the_order_of_sending() -> None:
    """Rank 0 sends microbatch 1 first, and rank 1 wants microbatch 0 first."""
    schedule = add_communication(parse_schedule("0F1 0F0 0B0 0B1\n1F0 1F1 1B0 1B1"))
    validate(schedule)
    assert format_schedule(schedule).splitlines()[1].startswith("1RECV_F1 1RECV_F0 1F0 1F1 ")


def test_one_rank_needs_no_communication() -> None:
    schedule = build_schedule("interleaved_1f1b", 1, 3, 2)
    assert add_communication(schedule) == schedule
    validate(schedule)


def test_adding_communication_twice_is_refused() -> None:
    with pytest.raises(ScheduleError, match="already"):
        add_communication(add_communication(one_f_one_b(2, 2)))


def test_partner_and_peer_name_the_other_end() -> None:
    for text, other, rank in [
        ("3SEND_F1", "4RECV_F1", 0),
        ("4RECV_F1", "3SEND_F1", 3),
        ("4SEND_B1", "3RECV_B1", 3),
        ("3RECV_B1", "4SEND_B1", 0),
    ]:
        assert str(partner(Action.parse(text))) == other
        assert peer_rank(Action.parse(text), round_robin(4, 2)) == rank
    with pytest.raises(ValueError, match="only sends and receives"):
        partner(Action.parse("3F0"))


def test_two_swapped_actions_name_each_ranks_blocked_action() -> None:
    schedule = add_communication(one_f_one_b(3, 3))
    last = list(schedule.actions[2])
    first_forward, last_backward = last.index(Action.parse("2F0")), last.index(Action.parse("2B2"))
    last[first_forward], last[last_backward] = last[last_backward], last[first_forward]
    schedule = replace(schedule, actions=(*schedule.actions[:2], tuple(last)))
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the schedule deadlocks"
    assert lines[1].startswith("  rank 0 is blocked at 0B0 (action ")
    assert lines[1].endswith("waiting for 1SEND_B0, on rank 1")
    assert lines[2].startswith("  rank 1 is blocked at 1B0 ")
    assert (
        lines[3]
        == f"  rank 2 is blocked at 2B2 (action 2 of {len(last)}), waiting for 2F2, which stands later in its own list"
    )
    assert len(caught.value.blocked) == 3
    assert caught.value.problems == []


def test_a_lost_send_names_the_message_and_who_waits_for_it() -> None:
    schedule = add_communication(one_f_one_b(2, 2))
    first = tuple(entry for entry in schedule.actions[0] if str(entry) != "0SEND_F1")
    schedule = replace(schedule, actions=(first, schedule.actions[1]))
    with pytest.raises(ScheduleError, match="missing from 2 stages x 2 microbatches on 2 ranks: 0SEND_F1") as caught:
        validate(schedule)
    assert "rank 1 is blocked at 1F1 (action 6 of 8), waiting for 0SEND_F1, which no rank has" in str(caught.value)


def test_two_ends_of_a_channel_in_different_order_are_refused() -> None:
    schedule = parse_schedule(
        """0F0 0SEND_F0 0F1 0SEND_F1
           1RECV_F1 1RECV_F0 1F0 1F1"""
    )
    with pytest.raises(
        ScheduleError, match="rank 0 -> rank 1: message 0 is 0SEND_F0, but rank 1 posts 1RECV_F1 where 1RECV_F0 is due"
    ):
        validate(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0F0 0B0", r"more than once: 0F0 \(2 times\)"),
        ("0F0 0F2 0B0 0B2", "missing from 1 stages x 3 microbatches on 1 ranks: 0F1, 0B1"),
        ("0F0 0F1 0B0", "missing .*: 0B1"),
        ("0B0", "missing .*: 0F0"),
        ("0B0 0F0", "rank 0 is blocked at 0B0 .* waiting for 0F0, which stands later"),
        ("0F0\n1F0", "run add_communication first"),
        (
            "0F0 0SEND_F0 0F1 0SEND_F1\n1RECV_F0 1F0 1RECV_F1 0F1 1F1",
            r"stages on ranks: 0 on 0, 1 on 1.*: 0F1 on rank 1",
        ),
        ("0F0 0I0", "missing .*: 0W0"),
        ("0F0 0W0", "missing .*: 0I0"),
        ("0F0 0B0 0W0", "missing .*: 0I0"),
        ("0F0 0W0 0I0", "rank 0 is blocked at 0W0 .* waiting for 0I0, which stands later"),
        (
            "0F0 (0F1;0B1)OVERLAP_F_B 0B0",
            "rank 0 is blocked at .0F1;0B1.OVERLAP_F_B .* waiting for 0F1, which is a part of it",
        ),
        ("0F0 1F0 0SEND_F0", "does not belong there .*: 0SEND_F0 on rank 0"),
        ("0F0 0F999999999", "missing from 1 stages x 1000000000 microbatches on 1 ranks: 0F1, 0F2, 0F3, 0F4, 0F5, ..."),
    ],
)
def test_each_broken_rule_is_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(parse_schedule(text))


@pytest.mark.parametrize("schedule", [Schedule((), ()), Schedule((), ((),)), Schedule((0, 1), ((), ()))])
def test_an_empty_schedule_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ScheduleError, match="no action"):
        validate(schedule)


def test_a_batch_cut_short_everywhere_is_caught_by_the_expected_size() -> None:
    schedule = add_communication(one_f_one_b(2, 3))
    validate(schedule)
    with pytest.raises(ScheduleError, match="missing from 2 stages x 4 microbatches"):
        validate(schedule, num_microbatches=4)
    with pytest.raises(ScheduleError, match="missing from 4 stages"):
        validate(schedule, num_stages=4)


def test_schedule_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ScheduleError(["a rule"], ["rank 0 is blocked"])))
    assert (error.problems, error.blocked) == (["a rule"], ["rank 0 is blocked"])
    assert "a rule" in str(error)
