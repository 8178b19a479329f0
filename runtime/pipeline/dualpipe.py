"""DualPipeV: forwards and backwards of different microbatches overlap (DeepSeek-AI 2024, section 3.2.1)."""

from collections import Counter, deque

from trimaran.runtime.pipeline.action import Action, ActionKind, Entry, Overlap
from trimaran.runtime.pipeline.schedule import Schedule, v_shape

_F, _B, _I, _W = ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """Two stages a rank, down the ranks and up again; in the steady state every forward overlaps a backward.

    DualPipe's V-shaped half (Qi 2025, "DualPipe could be better without the Dual"). A rank holds at most 2p + 1
    (stage, microbatch) pairs. With equal stages the idle time is (p - 1)(F&B + B - 3W); F&B is an overlap.

    Raises:
        ValueError: fewer microbatches than 2p, the number of stages.
    """
    if num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"num_microbatches ({num_microbatches}) must be at least 2 * pp ({2 * num_ranks}) for dualpipev; raise "
            f"train.global_batch_size, or lower parallel.pp to {max(1, num_microbatches // 2)} or less"
        )
    lists = [_RankOrder(rank, num_ranks, num_microbatches).entries for rank in range(num_ranks)]
    return Schedule(v_shape(num_ranks), tuple(tuple(entries) for entries in lists))


class _RankOrder:
    """The entries of one rank, in the eight phases of DualPipe."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int) -> None:
        self.down, self.up = rank, 2 * num_ranks - 1 - rank
        self.entries: list[Entry] = []
        self._done: Counter[tuple[bool, int]] = Counter()  # (is a forward, stage) -> microbatches that have had it
        self._weights: deque[Action] = deque()
        below, above = num_ranks - rank - 1, rank + 1  # ranks below this one; ranks from the first to this one
        for _ in range(2 * below):
            self._add(_F, self.down)
        for _ in range(above):
            self._add(_F, self.down)
            self._add(_F, self.up)
        for _ in range(below):
            self._add(_I, self.up)
            self._add_weights()
            self._add(_F, self.up)
        for turn in range(num_microbatches - 2 * num_ranks + above):
            if turn == 0 and below == 0:  # apart, the last rank answers sooner
                self._add(_F, self.down)
                self._add(_B, self.up)
            else:
                self._overlap(self.down, self.up)
            self._overlap(self.up, self.down)
        for _ in range(below):
            self._add(_B, self.up)
            self._overlap(self.up, self.down)
        for index in range(2 * above):  # from the middle on, the Ws are kept for the end
            self._add(_B if index < above else _I, self.down if index % 2 else self.up)
        for _ in range(below):
            self._add_weights()
            self._add(_I, self.down)
        while self._weights:
            self._add_weights()

    def _take(self, kind: ActionKind, stage: int) -> Action:
        """The action for the next microbatch of the stage."""
        key = (kind is _F, stage)
        self._done[key] += 1
        return Action(kind, stage, self._done[key] - 1)

    def _add(self, kind: ActionKind, stage: int) -> None:
        action = self._take(kind, stage)
        self.entries.append(action)
        if kind is _I:
            self._weights.append(Action(_W, stage, action.microbatch))

    def _add_weights(self) -> None:
        self.entries.append(self._weights.popleft())

    def _overlap(self, forward: int, backward: int) -> None:
        self.entries.append(Overlap(self._take(_F, forward), self._take(_B, backward)))
