"""Pipeline schedules as data: who computes which stage of which microbatch, in which order.

A schedule is one list of actions per pipeline rank. The generators here emit compute actions only (`F` and `B`);
`trimaran.runtime.pipeline.passes.add_communication` adds the sends and receives. Nothing here uses torch, a process
group or a config: the list that is drawn and simulated is the list that is executed.

Placement has one rule for every schedule: stage `s` is on rank `s % num_ranks`, so rank `r` holds the stages
`r, r + num_ranks, ...` (its chunks). In every schedule each stage runs its backwards in the order of the microbatches,
so gradients are summed in the same order and agree to the bit between schedules.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, TypeAlias


class ActionKind(Enum):
    """What an action does; the value is the text between stage and microbatch in `str(action)`."""

    F = "F"  # forward of one microbatch through one stage
    B = "B"  # full backward: gradients of the stage's input and of its weights
    SEND_F = "SEND_F"  # start sending the stage's output to the next stage
    RECV_F = "RECV_F"  # post the receive of the stage's input
    SEND_B = "SEND_B"  # start sending the gradient of the stage's input to the previous stage
    RECV_B = "RECV_B"  # post the receive of the gradient of the stage's output

    # Members are singletons, so identity is a valid hash. Enum's own hash hashes the name in Python, which is most of
    # the cost of looking up an Action in a set.
    __hash__ = object.__hash__

    def __init__(self, text: str) -> None:
        # Whether the action occupies the rank's compute; sends and receives only start a transfer.
        self.is_compute = text in ("F", "B")


_ACTION_PATTERN = re.compile(r"([0-9]+)(F|B|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one rank: `kind` on pipeline stage `stage` (global index) for microbatch `microbatch`.

    `str` gives `2F0` (stage 2, forward, microbatch 0) or `2SEND_F0`; `Action.parse` is its inverse.
    """

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> "Action":
        """Return the action of the text that `str` wrote.

        Raises:
            ValueError: `text` is not `<stage><kind><microbatch>`.
        """
        match = _ACTION_PATTERN.fullmatch(text.strip())
        if match is None:
            kinds = ", ".join(kind.value for kind in ActionKind)
            raise ValueError(
                f"an action is <stage><kind><microbatch>, such as 2F0 or 2SEND_F0, with a kind of {kinds}; got {text!r}"
            )
        stage, kind, microbatch = match.groups()
        return Action(ActionKind(kind), int(stage), int(microbatch))


Schedule: TypeAlias = list[list[Action]]


def rank_of_stage(stage: int, num_ranks: int) -> int:
    """The pipeline rank that holds `stage`: stages are assigned round-robin (Narayanan et al. 2021, section 2.2)."""
    return stage % num_ranks


def stages_of_rank(rank: int, num_ranks: int, virtual_stages: int = 1) -> list[int]:
    """The stages that `rank` holds, in the order of its chunks."""
    return [chunk * num_ranks + rank for chunk in range(virtual_stages)]


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe: every forward, then every backward (Huang et al. 2019, "GPipe", section 2.3).

    The paper's figure runs the backwards last microbatch first; here they run first to last, as in torch. That costs
    the same and keeps the order of gradient sums equal to that of the other schedules. Every rank holds the activations
    of all `num_microbatches`; the bubble is (p - 1) / (m + p - 1) with equal stages.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_sizes(num_ranks, num_microbatches, 1)
    return [
        [Action(kind, rank, m) for kind in (ActionKind.F, ActionKind.B) for m in range(num_microbatches)]
        for rank in range(num_ranks)
    ]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with a flush (Narayanan et al. 2021, "Efficient Large-Scale ...

    Megatron-LM", section 2.2.1: PipeDream-flush). Rank r warms up with p - r - 1 forwards, then alternates one forward
    and one backward, then drains. The bubble equals GPipe's, but rank r never holds more than min(m, p - r)
    microbatches.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_sizes(num_ranks, num_microbatches, 1)
    schedule: Schedule = []
    for rank in range(num_ranks):
        forwards = [Action(ActionKind.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(ActionKind.B, rank, m) for m in range(num_microbatches)]
        schedule.append(_warmup_steady_cooldown(forwards, backwards, num_ranks - rank - 1))
    return schedule


def interleaved_1f1b(num_ranks: int, num_microbatches: int, virtual_stages: int) -> Schedule:
    """Interleaved 1F1B: `virtual_stages` chunks a rank (Narayanan et al. 2021, section 2.2.2).

    Microbatches run in groups of `num_ranks`, each group through all chunks of a rank before the next group starts.
    Rank r warms up with 2 (p - r - 1) + (v - 1) p forwards (the count of Megatron-LM, one step more per hop than 1F1B,
    so that a rank alternates chunks without waiting). The bubble time falls by v: (p - 1) / (v m + p - 1) of the
    makespan. With one virtual stage this is plain 1F1B.

    Raises:
        ValueError: an argument is below 1, or virtual_stages > 1 and num_microbatches is not a multiple of num_ranks.
    """
    _check_sizes(num_ranks, num_microbatches, virtual_stages)
    if virtual_stages == 1:
        return one_f_one_b(num_ranks, num_microbatches)
    if not microbatches_fill_groups(num_microbatches, num_ranks, virtual_stages):
        raise ValueError(_group_rule(num_ranks, num_microbatches))
    schedule: Schedule = []
    for rank in range(num_ranks):
        chunks = stages_of_rank(rank, num_ranks, virtual_stages)
        forwards = [Action(ActionKind.F, stage, m) for stage, m in _depth_first(chunks, num_ranks, num_microbatches)]
        # Backwards visit the chunks from the last one, in the same groups.
        backwards = [
            Action(ActionKind.B, stage, m) for stage, m in _depth_first(chunks[::-1], num_ranks, num_microbatches)
        ]
        schedule.append(
            _warmup_steady_cooldown(forwards, backwards, 2 * (num_ranks - rank - 1) + (virtual_stages - 1) * num_ranks)
        )
    return schedule


def forward_only(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Forwards alone, for evaluation, with any number of microbatches and chunks.

    Every rank runs the same (chunk, microbatch) sequence, and each input comes from an earlier rank or an earlier
    entry, so a last group smaller than `num_ranks` cannot deadlock.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_sizes(num_ranks, num_microbatches, virtual_stages)
    return [
        [
            Action(ActionKind.F, stage, m)
            for stage, m in _depth_first(stages_of_rank(rank, num_ranks, virtual_stages), num_ranks, num_microbatches)
        ]
        for rank in range(num_ranks)
    ]


def build_schedule(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The compute actions of the training schedule called `name` (a key of `SCHEDULES`).

    Raises:
        ValueError: `name` is unknown, a size is below 1, or the schedule cannot run that shape.
    """
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {name!r}; did you mean {nearest!r}?")
    if virtual_stages != 1 and name not in INTERLEAVED:
        raise ValueError(
            f"virtual_stages ({virtual_stages}) must be 1 with schedule {name}; "
            "set parallel.virtual_stages to 1 or parallel.schedule to interleaved_1f1b"
        )
    return SCHEDULES[name](num_ranks, num_microbatches, virtual_stages)


def microbatches_fill_groups(num_microbatches: int, num_ranks: int, virtual_stages: int) -> bool:
    """Return whether the microbatches are whole groups of `num_ranks`, which more than one virtual stage needs."""
    return virtual_stages == 1 or num_microbatches % num_ranks == 0


ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b"]
SCHEDULES: Final[dict[str, Callable[[int, int, int], Schedule]]] = {
    "gpipe": lambda num_ranks, num_microbatches, _: gpipe(num_ranks, num_microbatches),
    "1f1b": lambda num_ranks, num_microbatches, _: one_f_one_b(num_ranks, num_microbatches),
    "interleaved_1f1b": interleaved_1f1b,
}
INTERLEAVED: Final = ("interleaved_1f1b",)
"""The schedules that take more than one virtual stage."""


def format_schedule(schedule: Sequence[Sequence[Action]]) -> str:
    """One line a rank, actions separated by a space; `parse_schedule` is its inverse."""
    return "\n".join(" ".join(str(action) for action in actions) for actions in schedule)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that `format_schedule` wrote: one rank per line, blank lines skipped.

    Raises:
        ValueError: a word is not an action.
    """
    return [[Action.parse(word) for word in line.split()] for line in text.splitlines() if line.strip()]


def _warmup_steady_cooldown(forwards: list[Action], backwards: list[Action], num_warmup: int) -> list[Action]:
    num_warmup = min(num_warmup, len(forwards))
    actions = forwards[:num_warmup]
    for forward, backward in zip(
        forwards[num_warmup:], backwards, strict=False
    ):  # the remaining backwards are the cooldown
        actions += [forward, backward]
    return actions + backwards[len(forwards) - num_warmup :]


def _depth_first(chunks: list[int], group_size: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(stage, microbatch) pairs: each group of `group_size` microbatches through all `chunks` before the next group."""
    return [
        (stage, m)
        for first in range(0, num_microbatches, group_size)
        for stage in chunks
        for m in range(first, min(first + group_size, num_microbatches))
    ]


def _check_sizes(num_ranks: int, num_microbatches: int, virtual_stages: int) -> None:
    for name, value in (
        ("num_ranks", num_ranks),
        ("num_microbatches", num_microbatches),
        ("virtual_stages", virtual_stages),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def _group_rule(num_ranks: int, num_microbatches: int) -> str:
    below = num_microbatches // num_ranks * num_ranks
    counts = " or ".join(str(count) for count in (below, below + num_ranks) if count)
    ranks = ", ".join(str(p) for p in range(1, num_microbatches + 1) if num_microbatches % p == 0)
    return (
        f"num_microbatches ({num_microbatches}) must be a multiple of pp ({num_ranks}) for interleaved_1f1b; "
        f"use {counts} microbatches (global_batch_size = micro_batch_size x num_microbatches x dp), "
        f"or set parallel.pp to one of {ranks}"
    )
