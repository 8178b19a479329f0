"""Pipeline schedules as data: who computes which stage of which microbatch, in which order.

A schedule is one list of actions per pipeline rank. The generators here emit compute actions only (`F` and `B`);
`trimaran.runtime.pipeline.passes.add_communication` adds the sends and receives. Nothing here uses torch, a process
group or a config: the list that is drawn and simulated is the list that is executed.

A schedule says where its stages live; the stages of a rank are its chunks. In every schedule each stage runs its
backwards in the order of the microbatches, so gradients are summed in the same order and agree to the bit between
schedules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from trimaran.runtime.pipeline.action import Action, ActionKind, Entry, parse_entry

Placement: TypeAlias = tuple[int, ...]
"""Stage (global index) -> the pipeline rank that holds it."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where the stages live, and what each pipeline rank does.

    Attributes:
        placement: stage -> the pipeline rank that holds it.
        actions: for each pipeline rank, its entries in their order.
    """

    placement: Placement
    actions: tuple[tuple[Entry, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return len(self.placement)


def round_robin(num_ranks: int, virtual_stages: int = 1) -> Placement:
    """Stage s on rank s % num_ranks (Narayanan et al. 2021, section 2.2)."""
    return tuple(range(num_ranks)) * virtual_stages


def v_shape(num_ranks: int) -> Placement:
    """Two stages a rank, down the ranks and up again (Qi et al. 2024, section 6): s on rank s, then on 2p - 1 - s."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def stages_of_rank(placement: Placement, rank: int) -> list[int]:
    """The stages that `rank` holds, in the order of its chunks."""
    return [stage for stage, holder in enumerate(placement) if holder == rank]


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe: every forward, then every backward (Huang et al. 2019, "GPipe", section 2.3).

    The paper's figure runs the backwards last microbatch first; here they run first to last, as in torch. That costs
    the same and keeps the order of gradient sums equal to that of the other schedules. Every rank holds the activations
    of all `num_microbatches`; the bubble is (p - 1) / (m + p - 1) with equal stages.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_sizes(num_ranks, num_microbatches, 1)
    return _schedule(
        round_robin(num_ranks),
        [
            [Action(kind, rank, m) for kind in (ActionKind.F, ActionKind.B) for m in range(num_microbatches)]
            for rank in range(num_ranks)
        ],
    )


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with a flush (Narayanan et al. 2021, "Efficient Large-Scale ...

    Megatron-LM", section 2.2.1: PipeDream-flush). Rank r warms up with p - r - 1 forwards, then alternates one forward
    and one backward, then drains. The bubble equals GPipe's, but rank r never holds more than min(m, p - r)
    microbatches.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_sizes(num_ranks, num_microbatches, 1)
    lists = []
    for rank in range(num_ranks):
        forwards = [Action(ActionKind.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(ActionKind.B, rank, m) for m in range(num_microbatches)]
        lists.append(_warmup_steady_cooldown(forwards, backwards, num_ranks - rank - 1))
    return _schedule(round_robin(num_ranks), lists)


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
    placement, lists = round_robin(num_ranks, virtual_stages), []
    for rank in range(num_ranks):
        chunks = stages_of_rank(placement, rank)
        forwards = [Action(ActionKind.F, stage, m) for stage, m in _depth_first(chunks, num_ranks, num_microbatches)]
        # Backwards visit the chunks from the last one, in the same groups.
        backwards = [
            Action(ActionKind.B, stage, m) for stage, m in _depth_first(chunks[::-1], num_ranks, num_microbatches)
        ]
        warmup = 2 * (num_ranks - rank - 1) + (virtual_stages - 1) * num_ranks
        lists.append(_warmup_steady_cooldown(forwards, backwards, warmup))
    return _schedule(placement, lists)


def forward_only(placement: Placement, num_microbatches: int) -> Schedule:
    """Forwards alone, for evaluation, with any number of microbatches and chunks.

    Every rank runs the same (chunk, microbatch) sequence, and each input comes from an earlier entry or from the same
    entry of another rank, so a last group smaller than the number of ranks cannot deadlock.

    Raises:
        ValueError: `num_microbatches` is below 1.
    """
    num_ranks = 1 + max(placement)
    _check_sizes(num_ranks, num_microbatches, 1)
    lists = [_depth_first(stages_of_rank(placement, rank), num_ranks, num_microbatches) for rank in range(num_ranks)]
    return _schedule(placement, [[Action(ActionKind.F, stage, m) for stage, m in each] for each in lists])


def microbatches_fill_groups(num_microbatches: int, num_ranks: int, virtual_stages: int) -> bool:
    """Return whether the microbatches are whole groups of `num_ranks`, which more than one virtual stage needs."""
    return virtual_stages == 1 or num_microbatches % num_ranks == 0


def format_schedule(schedule: Schedule) -> str:
    """One line a rank, entries separated by a space; `parse_schedule` is its inverse."""
    return "\n".join(" ".join(str(entry) for entry in entries) for entries in schedule.actions)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that `format_schedule` wrote: one rank per line, blank lines skipped.

    A stage lives where its first action is.

    Raises:
        ValueError: a word is no entry, or a stage below the highest has no action.
    """
    lists = [[parse_entry(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    return _schedule(placement_of_lists(lists), lists)


def placement_of_lists(lists: Sequence[Sequence[Entry]]) -> Placement:
    """Return where the stages live: each on the first rank that has a compute action of it.

    Raises:
        ValueError: a stage below the highest has no compute action.
    """
    found: dict[int, int] = {}
    for rank, entries in enumerate(lists):
        for entry in entries:
            for action in entry.parts if entry.is_compute else ():
                found.setdefault(action.stage, rank)
    missing = next((stage for stage in range(len(found)) if stage not in found), None)
    if missing is not None:
        raise ValueError(f"stage {missing} has no action, but stage {max(found)} has")
    return tuple(found[stage] for stage in range(len(found)))


def _schedule(placement: Placement, lists: Sequence[Sequence[Entry]]) -> Schedule:
    return Schedule(placement, tuple(tuple(entries) for entries in lists))


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
