"""The orders that the schedule generators emit, against torch's own and against the rules they promise."""

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from trimaran.runtime.pipeline.action import Action, ActionKind, Overlap, actions_of, parse_entry
from trimaran.runtime.pipeline.csv_text import read_csv, write_csv
from trimaran.runtime.pipeline.passes import add_communication
from trimaran.runtime.pipeline.schedule import (
    Schedule,
    format_schedule,
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    parse_schedule,
    round_robin,
    stages_of_rank,
)
from trimaran.runtime.pipeline.schedules import SCHEDULES, build_schedule

ALL_SHAPES = [
    ("gpipe", 1, 1, 1),
    ("gpipe", 4, 2, 1),
    ("gpipe", 3, 7, 1),
    ("1f1b", 1, 3, 1),
    ("1f1b", 4, 2, 1),
    ("1f1b", 4, 8, 1),
    ("interleaved_1f1b", 1, 3, 2),
    ("interleaved_1f1b", 2, 4, 3),
    ("interleaved_1f1b", 4, 4, 2),
    ("interleaved_1f1b", 4, 8, 1),
]


class _RecordingStage:
    """Stands in for a torch pipeline stage: it only writes down what it is asked to compute."""

    def __init__(self, stage_index: int) -> None:
        self.stage_index = stage_index
        self.order: list[str] = []

    def forward_one_chunk(self, microbatch: int, *_args: Any, **_options: Any) -> None:
        self.order.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch: int, **_options: Any) -> None:
        self.order.append(f"{self.stage_index}B{microbatch}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("get_fwd_", "get_bwd_")):
            return lambda _microbatch: []  # no peer, so no point-to-point operations
        if name == "perform_reduce_grad":
            return lambda _scale: None
        raise AttributeError(name)


def _order_torch_runs(schedule_class: type, num_ranks: int, num_microbatches: int) -> list[list[str]]:
    """What torch's schedule computes on each rank, by running its step loop on a recording stage.

    Its `pipeline_order` table is not used for 1F1B: in torch 2.13 the last rank's forwards there are numbered from 1.
    """
    order = []
    for rank in range(num_ranks):
        schedule: Any = object.__new__(schedule_class)
        schedule._stage = _RecordingStage(rank)
        schedule._num_stages = num_ranks
        schedule._n_microbatches = num_microbatches
        schedule.scale_grads = False
        nothing = [()] * num_microbatches
        schedule._check_inputs = lambda *_, nothing=nothing: (nothing, nothing)
        for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
            setattr(schedule, name, lambda *_: None)
        schedule._step_microbatches()
        order.append(schedule._stage.order)
    return order


def _texts(schedule: Schedule) -> list[list[str]]:
    return [[str(entry) for entry in entries] for entries in schedule.actions]


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches"), [(1, 1), (1, 5), (2, 2), (4, 2), (4, 4), (4, 8), (8, 3), (5, 11)]
)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(gpipe, torch_schedules.ScheduleGPipe), (one_f_one_b, torch_schedules.Schedule1F1B)]
)
def test_compute_order_is_the_one_torch_runs(ours: Any, theirs: type, num_ranks: int, num_microbatches: int) -> None:
    assert _texts(ours(num_ranks, num_microbatches)) == _order_torch_runs(theirs, num_ranks, num_microbatches)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 2), (4, 8), (3, 5)])
def test_gpipe_order_is_torchs_pipeline_order(num_ranks: int, num_microbatches: int) -> None:
    schedule: Any = object.__new__(torch_schedules.ScheduleGPipe)
    schedule._num_stages, schedule._n_microbatches = num_ranks, num_microbatches
    table = schedule._get_pipeline_order()
    expected = [[str(a) for a in table[rank] if a is not None and a.is_compute_op] for rank in range(num_ranks)]
    assert _texts(gpipe(num_ranks, num_microbatches)) == expected


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "virtual_stages"),
    [(2, 2, 2), (2, 6, 3), (4, 4, 2), (4, 8, 2), (4, 16, 3), (8, 8, 4), (1, 5, 3)],
)
def test_interleaved_order_is_torchs_pipeline_order(num_ranks: int, num_microbatches: int, virtual_stages: int) -> None:
    schedule: Any = object.__new__(torch_schedules.ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages = num_ranks, virtual_stages
    schedule._n_microbatches = num_microbatches
    schedule.microbatches_per_round = num_ranks
    expected = [
        [str(a) for a in schedule._calculate_single_rank_operations(rank) if a is not None] for rank in range(num_ranks)
    ]
    assert _texts(interleaved_1f1b(num_ranks, num_microbatches, virtual_stages)) == expected


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches", "virtual_stages"), ALL_SHAPES)
def test_every_stage_runs_every_microbatch_once_each_way_in_order(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int
) -> None:
    schedule = build_schedule(name, num_ranks, num_microbatches, virtual_stages)
    for rank, entries in enumerate(schedule.actions):
        stages, actions = stages_of_rank(schedule.placement, rank), actions_of(entries)
        assert {action.stage for action in actions} == set(stages)
        for stage in stages:
            # The order of backwards is the order of gradient sums, so it must be the same in every schedule.
            for kind in (ActionKind.F, ActionKind.B):
                assert [a.microbatch for a in actions if (a.stage, a.kind) == (stage, kind)] == list(
                    range(num_microbatches)
                )


def test_one_f_one_b_of_four_ranks_reads_as_in_the_paper() -> None:
    text = format_schedule(one_f_one_b(4, 4))
    assert text.splitlines()[2] == "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2B3"
    assert text.splitlines()[3] == "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3"


def test_stages_are_dealt_to_ranks_in_turn() -> None:
    assert round_robin(4, 3) == (0, 1, 2, 3) * 3
    assert stages_of_rank(round_robin(4, 3), 1) == [1, 5, 9]


@pytest.mark.parametrize(("num_microbatches", "virtual_stages"), [(1, 1), (5, 1), (5, 2), (2, 3), (8, 2)])
def test_forward_only_takes_any_number_of_microbatches(num_microbatches: int, virtual_stages: int) -> None:
    lists = [actions_of(entries) for entries in forward_only(round_robin(4, virtual_stages), num_microbatches).actions]
    assert all(action.kind is ActionKind.F for actions in lists for action in actions)
    assert all(len(set(actions)) == len(actions) == num_microbatches * virtual_stages for actions in lists)


@pytest.mark.parametrize("kind", list(ActionKind))
def test_an_action_prints_and_parses(kind: ActionKind) -> None:
    action = Action(kind, 12, 345)
    assert str(action) == f"12{kind.value}345"
    assert Action.parse(str(action)) == action


def test_an_overlap_prints_and_parses_as_torchs() -> None:
    text = "(0F3;3B1)OVERLAP_F_B"
    overlap = parse_entry(text)
    assert overlap == Overlap(Action.parse("0F3"), Action.parse("3B1"))
    assert str(overlap) == text == str(torch_schedules._Action.from_str(text))
    for wrong in ("(3B1;0F3)OVERLAP_F_B", "(0F3;3W1)OVERLAP_F_B"):
        with pytest.raises(ValueError, match="an overlap is of a forward"):
            parse_entry(wrong)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0 3", "2SEND0", "٢F0"])
def test_a_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="an action is <stage><kind><microbatch>"):
        Action.parse(text)


def test_a_schedule_prints_and_parses() -> None:
    schedule = interleaved_1f1b(2, 4, 2)
    assert parse_schedule(format_schedule(schedule)) == schedule


def test_interleaved_refuses_microbatches_that_leave_a_partial_group() -> None:
    with pytest.raises(
        ValueError, match=r"num_microbatches \(6\) must be a multiple of pp \(4\).*use 4 or 8 microbatches.*1, 2, 3, 6"
    ):
        interleaved_1f1b(4, 6, 2)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_single_chunk_schedules_refuse_virtual_stages(name: str) -> None:
    with pytest.raises(ValueError, match=rf"virtual_stages \(2\) must be 1 with schedule {name}"):
        build_schedule(name, 4, 8, 2)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-2, 1, 1)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        interleaved_1f1b(*sizes)
    with pytest.raises(ValueError, match="must be at least 1"):
        forward_only((0,), 0)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'interleaved_1f1b'"):
        build_schedule("interleaved", 2, 2)
    assert set(SCHEDULES) == {"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", "zbv", "dualpipev"}


@pytest.mark.parametrize(
    ("name", "v"), [("gpipe", 1), ("interleaved_1f1b", 2), ("zb_h2", 1), ("zbv", 2), ("dualpipev", 2)]
)
def test_a_schedule_is_read_again_from_its_text(name: str, v: int) -> None:
    schedule = build_schedule(name, 3, 6, v)
    assert read_csv(write_csv(schedule), "mine.csv") == schedule
    assert read_csv(write_csv(add_communication(schedule)).replace(",", ", ,"), "mine.csv") == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0\n", "mine.csv, line 1: an action is <stage><kind><microbatch>.*got '0X0'"),
        ("0F0,0B0\n0SEND_F0\n", "mine.csv, line 2: 0SEND_F0 is a transfer"),
        ("0F0,0B0\n2F0,2B0\n", "mine.csv: stage 1 has no action, but stage 2 has"),
        ("0F0,0I0\n", "mine.csv: the schedule is not valid(.|\n)*0W0"),
        ("0B0,0F0\n", "mine.csv: the schedule deadlocks(.|\n)*waiting for 0F0"),
        ("\ufeff0F0,0B0\r\n1F" + "9" * 5000, "mine.csv, line 2: an action is .*'1F9{58}'$"),
        ("0F0\0,0B0", "mine.csv, line 1: an action is"),
        ('"0F0","0B0"', "mine.csv, line 1: an action is"),
        ("(0F0;0B0)OVERLAP_F_B", "mine.csv: the schedule deadlocks"),
        ("0F0,0B0\n\n1F0,1B0", "mine.csv, line 2 is empty"),
        ("x" * 200_000, "mine.csv, line 1: an action is"),
        ("", "mine.csv: the schedule is not valid(.|\n)*the schedule has 0 ranks and no action"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(text, "mine.csv")
