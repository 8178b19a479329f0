"""The table of training schedules: what each takes, where its stages live, and what makes its lists."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from trimaran.runtime.pipeline.dualpipe import dualpipev
from trimaran.runtime.pipeline.schedule import (
    Placement,
    Schedule,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    round_robin,
    v_shape,
)
from trimaran.runtime.pipeline.simulate import Costs
from trimaran.runtime.pipeline.zero_bubble import zb_h1, zb_h2, zbv

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", "zbv", "dualpipev"]


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule.

    Attributes:
        build: (pipeline ranks, microbatches, virtual stages, costs) -> the schedule, without communication.
        virtual_stages: how many stages each rank holds; None: any number.
        is_v: whether the stages go down the ranks and up again; else they go round them.
        in_groups: whether the microbatches must be a multiple of the pipeline ranks where a rank holds several stages.
        splits_backward: whether some backwards are two actions.
        twice_the_ranks: whether there must be at least two microbatches a pipeline rank.
    """

    build: Callable[[int, int, int, Costs], Schedule]
    virtual_stages: int | None = 1
    is_v: bool = False
    in_groups: bool = False
    splits_backward: bool = False
    twice_the_ranks: bool = False

    def placement(self, num_ranks: int, virtual_stages: int) -> Placement:
        """Where the stages live: stage -> pipeline rank."""
        return v_shape(num_ranks) if self.is_v else round_robin(num_ranks, virtual_stages)

    def fewest_microbatches(self, num_ranks: int) -> int:
        """The fewest microbatches of a step."""
        return 2 * num_ranks if self.twice_the_ranks else 1


SCHEDULES: Final[dict[ScheduleName, ScheduleRow]] = {
    "gpipe": ScheduleRow(lambda p, m, v, costs: gpipe(p, m)),
    "1f1b": ScheduleRow(lambda p, m, v, costs: one_f_one_b(p, m)),
    "interleaved_1f1b": ScheduleRow(lambda p, m, v, costs: interleaved_1f1b(p, m, v), None, in_groups=True),
    "zb_h1": ScheduleRow(lambda p, m, v, costs: zb_h1(p, m, costs), splits_backward=True),
    "zb_h2": ScheduleRow(lambda p, m, v, costs: zb_h2(p, m, costs), splits_backward=True),
    "zbv": ScheduleRow(lambda p, m, v, costs: zbv(p, m, costs), 2, is_v=True, splits_backward=True),
    "dualpipev": ScheduleRow(
        lambda p, m, v, costs: dualpipev(p, m), 2, is_v=True, splits_backward=True, twice_the_ranks=True
    ),
}


def build_schedule(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1, costs: Costs | None = None
) -> Schedule:
    """The compute actions of the training schedule called `name` (a key of `SCHEDULES`).

    Args:
        costs: of a microbatch in each stage, for the schedules that are planned with them; None: equal stages.

    Raises:
        ValueError: `name` is unknown, a size is below 1, or the schedule cannot run that shape.
    """
    row = next((row for key, row in SCHEDULES.items() if key == name), None)
    if row is None:
        nearest = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}; did you mean {nearest!r}?")
    if row.virtual_stages not in (None, virtual_stages):
        raise ValueError(
            f"virtual_stages ({virtual_stages}) must be {row.virtual_stages} with schedule {name}; "
            f"set parallel.virtual_stages to {row.virtual_stages} or parallel.schedule to interleaved_1f1b"
        )
    costs = costs or Costs.uniform(max(1, num_ranks * virtual_stages))
    return row.build(num_ranks, num_microbatches, virtual_stages, costs)
