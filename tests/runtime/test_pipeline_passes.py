"""Communication is complete and overlaps; validate accepts exactly the schedules that run."""

import pickle
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from trimaran.runtime.pipeline.passes import ScheduleError, add_communication, partner, peer_rank, validate
from trimaran.runtime.pipeline.schedule import (
    Action,
    ActionKind,
    Schedule,
    build_schedule,
    format_schedule,
    forward_only,
    one_f_one_b,
    parse_schedule,
)

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
    ("forward_only", 2, 3, 1),
    ("forward_only", 3, 4, 2),
]


def _communicated(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    if name == "forward_only":
        return add_communication(forward_only(num_ranks, num_microbatches, virtual_stages))
    return add_communication(build_schedule(name, num_ranks, num_microbatches, virtual_stages))


def _runs(schedule: Sequence[Sequence[Action]], num_stages: int, num_microbatches: int, rng: random.Random) -> bool:
    """Executes the lists on symbolic data and tells whether the whole batch came out: what validate is tested against.

    Ranks take turns at random. Channels are queues: the k-th posted receive gets the k-th message sent, whatever it is;
    computing on anything but the neighbour's tensor of the same microbatch is a failure.
    """
    num_ranks = len(schedule)
    sent: dict[tuple[int, int, str], list[tuple[str, int, int]]] = {}
    posted: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    made: Counter[tuple[str, int, int]] = Counter()
    used: Counter[tuple[str, int, int]] = Counter()
    position = [0] * num_ranks

    def step(rank: int, action: Action) -> str:
        direction, stage, m = action.kind.value[-1], action.stage, action.microbatch
        if stage % num_ranks != rank or not 0 <= stage < num_stages or not 0 <= m < num_microbatches:
            return "wrong"
        source, target = (stage - 1, stage + 1) if direction == "F" else (stage + 1, stage - 1)
        if action.kind.value.startswith("SEND"):
            if not made[direction, stage, m]:
                return "wrong"
            sent.setdefault((rank, target % num_ranks, direction), []).append((direction, stage, m))
            return "ran"
        channel = (source % num_ranks, rank, direction)
        if action.kind.value.startswith("RECV"):
            posted.setdefault(channel, []).append((stage, m))
            return "ran"
        if direction == "B" and not made["F", stage, m]:
            return "wrong"
        if 0 <= source < num_stages:
            if source % num_ranks == rank:
                if not made[direction, source, m]:
                    return "wrong"
            elif (stage, m) not in posted.get(channel, []):
                return "wrong"
            else:
                slot = posted[channel].index((stage, m))
                if slot >= len(sent.get(channel, [])):
                    return "waits"
                if sent[channel][slot] != (direction, source, m):
                    return "wrong"
                used[direction, stage, m] += 1
        made[direction, stage, m] += 1
        return "ran"

    while True:
        moved = False
        for rank in rng.sample(range(num_ranks), num_ranks):
            while position[rank] < len(schedule[rank]):
                outcome = step(rank, schedule[rank][position[rank]])
                if outcome == "wrong":
                    return False
                if outcome == "waits":
                    break
                position[rank] += 1
                moved = True
        if not moved:
            break
    directions = {action.kind.value[-1] for actions in schedule for action in actions}
    everything = Counter(
        {(d, s, m): 1 for d in directions | {"F"} for s in range(num_stages) for m in range(num_microbatches)}
    )
    receives = Counter((channel[2], *slot) for channel, slots in posted.items() for slot in slots)
    return (
        all(position[rank] == len(actions) for rank, actions in enumerate(schedule))
        and made == everything
        and receives == used
        and {channel: len(messages) for channel, messages in sent.items()}
        == {channel: len(slots) for channel, slots in posted.items()}
    )


def _mutate(schedule: Schedule, rng: random.Random) -> Schedule:
    mutant = [list(actions) for actions in schedule]
    rank = rng.choice([rank for rank, actions in enumerate(mutant) if actions])
    actions = mutant[rank]
    index, other = rng.randrange(len(actions)), rng.randrange(len(actions))
    match rng.choice(["swap", "neighbours", "drop", "duplicate", "move", "other rank", "relabel"]):
        case "swap":
            actions[index], actions[other] = actions[other], actions[index]
        case "neighbours":
            other = max(0, index - 1)
            actions[index], actions[other] = actions[other], actions[index]
        case "drop":
            del actions[index]
        case "duplicate":
            actions.insert(other, actions[index])
        case "move":
            actions.insert(other, actions.pop(index))
        case "other rank":
            target = rng.choice(mutant)
            target.insert(rng.randint(0, len(target)), actions.pop(index))
        case "relabel":
            old = actions[index]
            actions[index] = rng.choice(
                [
                    Action(rng.choice(list(ActionKind)), old.stage, old.microbatch),
                    Action(old.kind, old.stage + rng.choice([-1, 1]), old.microbatch),
                    Action(old.kind, old.stage, old.microbatch + rng.choice([-1, 1])),
                ]
            )
    return mutant


def _is_accepted(schedule: Schedule, num_stages: int, num_microbatches: int) -> bool:
    try:
        validate(schedule, num_stages=num_stages, num_microbatches=num_microbatches)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_schedules_are_valid_and_run(shape: tuple[str, int, int, int]) -> None:
    _, num_ranks, num_microbatches, virtual_stages = shape
    schedule = _communicated(*shape)
    validate(schedule)
    validate(schedule, num_stages=num_ranks * virtual_stages, num_microbatches=num_microbatches)
    assert _runs(schedule, num_ranks * virtual_stages, num_microbatches, random.Random(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_validate_accepts_a_mutated_schedule_exactly_when_it_runs(shape: tuple[str, int, int, int]) -> None:
    _, num_ranks, num_microbatches, virtual_stages = shape
    rng = random.Random(f"{shape}")
    schedule = _communicated(*shape)
    verdicts = Counter[bool]()
    for _ in range(400):
        mutant = schedule
        for _ in range(rng.choice([1, 1, 2, 3])):
            if any(mutant):
                mutant = _mutate(mutant, rng)
        expected = _runs(mutant, num_ranks * virtual_stages, num_microbatches, rng)
        assert _is_accepted(mutant, num_ranks * virtual_stages, num_microbatches) == expected, format_schedule(mutant)
        verdicts[expected] += 1
    assert verdicts[False] > 50, "the mutations were too tame to test anything"


def test_communication_of_two_ranks_reads_as_expected() -> None:
    text = format_schedule(add_communication(one_f_one_b(2, 2)))
    assert text.splitlines() == [
        "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1",
        # Its first receive is directly before its use, every other one a compute action ahead.
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_sends_follow_their_compute_and_receives_lead_by_one_compute_action(shape: tuple[str, int, int, int]) -> None:
    for actions in _communicated(*shape):
        compute = [action for action in actions if action.kind.is_compute]
        for index, action in enumerate(actions):
            name, _, direction = action.kind.value.partition("_")
            if name == "SEND":
                assert str(actions[index - 1]) == f"{action.stage}{direction}{action.microbatch}"
            if name == "RECV":
                user = compute.index(Action(ActionKind[direction], action.stage, action.microbatch))
                num_computed = sum(before.kind.is_compute for before in actions[:index])
                assert num_computed == max(0, user - 1)


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
        assert peer_rank(Action.parse(text), 4) == rank
    with pytest.raises(ValueError, match="only sends and receives"):
        partner(Action.parse("3F0"))


def test_two_swapped_actions_name_each_ranks_blocked_action() -> None:
    schedule = add_communication(one_f_one_b(3, 3))
    last = schedule[2]
    first_forward, last_backward = last.index(Action.parse("2F0")), last.index(Action.parse("2B2"))
    last[first_forward], last[last_backward] = last[last_backward], last[first_forward]
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
    schedule[0].remove(Action.parse("0SEND_F1"))
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
        ("1RECV_F0 1F0\n0F0 0SEND_F0", "does not belong there .*: 1RECV_F0 on rank 0"),
        ("0F0 0SEND_F0 2RECV_F0 2F0\n1RECV_F0 1F0 1SEND_F0", "3 stages cannot be dealt evenly to 2 ranks"),
        ("0F0 1F0 0SEND_F0", "does not belong there .*: 0SEND_F0 on rank 0"),
        ("0F0 0F999999999", "missing from 1 stages x 1000000000 microbatches on 1 ranks: 0F1, 0F2, 0F3, 0F4, 0F5, ..."),
    ],
)
def test_each_broken_rule_is_named(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(parse_schedule(text))


@pytest.mark.parametrize("schedule", [[], [[]], [[], []]])
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
