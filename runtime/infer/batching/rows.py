"""The texts of one group of rows, the same on every rank of a replica: who has which row, and what is read next.

A request takes a free row. Its prompt is read by passes over that row alone, in pieces while other texts go on, so that
these wait for a bounded time; then it takes part in the decode passes, each one token of every text that goes on. Their
rows lie together at the front: a pass reads a range of the cache without a copy and computes nothing but their tokens.
The tokens of a row whose request has ended stay until the row is taken, and whoever begins with them reads only what
follows. Nothing here depends on time, so that all ranks decide alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trimaran.models.cache.rows import RowCache
from trimaran.runtime.infer.batching.messages import (
    Event,
    Failed,
    Finish,
    Finished,
    NewToken,
    PromptScores,
    Request,
    TopLogprobs,
)
from trimaran.runtime.infer.sampling import NOT_FINITE

_LEAST_COPIED = 16  # tokens of a common beginning, for which a copy pays


@dataclass(eq=False)
class Row:
    """A row of the cache, and the text in it.

    Attributes:
        number: its own, wherever it lies.
        place: in the cache.
        tokens: of the text; after its request only those that are cached.
        cached: how many of them, from the first on, have their keys and values in the cache, or will by a pass under
            way.
        read_at: the longest sequence of the passes that have read its prompt; with dynamic scaling it counts.
        reused: tokens of the prompt that were there already.
        num_new: tokens drawn for the request.
        used: when it was left.
    """

    number: int
    place: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    read_at: int = 0
    request: Request | None = None
    reused: int = 0
    num_new: int = 0
    used: int = 0
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)

    @property
    def is_going_on(self) -> bool:
        """Whether its next token is a decode pass away."""
        return self.request is not None and self.num_new > 0


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass over rows that lie together, of the same number of new tokens each.

    Args:
        new: tokens of each row; its last ones.
        draws: whether a token is drawn behind each row's last.
        scored: of a single row: how many of the pass's first tokens are followed by a prompt token that is scored.
    """

    rows: tuple[Row, ...]
    new: int
    draws: bool
    scored: int = 0

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each row."""
        return [row.tokens[row.cached - self.new : row.cached] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row after the pass."""
        return [row.cached for row in self.rows]

    @property
    def most_told(self) -> int | None:
        """The most of the likeliest tokens that a row wants to know; None where none wants log-probabilities."""
        requests = [row.request for row in self.rows if row.request is not None]
        wanted = [0 if each.top_logprobs is None and each.scores_prompt else each.top_logprobs for each in requests]
        return max((each for each in wanted if each is not None), default=None)

    @property
    def shape(self) -> tuple[int, int]:
        """Lines and numbers a line of its `Found`: see `passes.encode`."""
        told = 0 if self.most_told is None else 1 + 2 * self.most_told
        return self.scored + (len(self.rows) if self.draws else 0), 1 + told


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass has found at one place: a token, its log-probability, and the likeliest ones."""

    token: int
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True)
class Pieces:
    """How much of prompts is read at once.

    Args:
        alone: most tokens of a turn in which no text goes on.
        among: the same while texts go on, which wait for it.
        shared: up to how many tokens a sequence is computed alike whatever follows it; None for any number. With
            dynamic scaling only: then a longer prompt is read at once, and each text has a pass of its own.
    """

    alone: int
    among: int
    shared: int | None = None


class RowGroup:
    """Rows whose texts go through the stages together.

    Args:
        count: of rows.
        context: most tokens of a prompt and its continuation.
        group: all groups of the replica, this one among them, whose rows' beginnings are shared.
    """

    def __init__(self, count: int, context: int, memory: RowCache, pieces: Pieces, groups: "list[RowGroup]") -> None:
        self.rows = [Row(number, number) for number in range(count)]
        self.memory = memory
        self._context, self._pieces, self._groups = context, pieces, groups
        self._order: list[Row] = []  # whose prompts are not read yet, in the order of their coming
        self._clock = 0

    @property
    def free(self) -> int:
        """Rows without a request."""
        return sum(row.request is None for row in self.rows)

    @property
    def is_idle(self) -> bool:
        """Whether no row has a request."""
        return self.free == len(self.rows)

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt, its last one aside, the rows have."""
        return max((self._common(prompt, row) for row in self.rows), default=0)

    def join(self, request: Request) -> None:
        """Give a request a row. There must be a free one."""
        prompt = list(request.prompt)
        free = [row for row in self.rows if row.request is None]
        # In the place of a text that it continues, or else in that of the text that nobody has used for longest.
        found = [(self._common(prompt, row), row) for row in free if row.tokens]
        common, row = max(found, key=lambda each: each[0], default=(0, free[0]))
        if common == 0 or 2 * common < len(row.tokens):
            row = min(free, key=lambda each: (bool(each.tokens), each.used, each.place))
            common = self._common(prompt, row)  # it may be the same, the only free one
        common = 0 if request.scores_prompt else common
        row.tokens, row.cached, row.reused, row.read_at = prompt, common, common, 0
        row.request, row.num_new, row.logprobs, row.top = request, 0, [], []
        self._order.append(row)

    def cancel(self, request: int) -> None:
        """Free the row of a request, if it has one."""
        for row in self.rows:
            if row.request is not None and row.request.id == request:
                self._leave(row)

    def passes(self) -> Iterator[Pass]:
        """Yield this turn's passes. Each must have been computed before the next one is asked for."""
        self._clock += 1
        left = self._pieces.among if any(row.is_going_on for row in self.rows) else self._pieces.alone
        while self._order and left > 0:
            row = self._order[0]
            step = self._read(row, left)
            left -= step.new
            if row.cached == len(row.request.prompt if row.request else ()):
                self._order.pop(0)
            yield step
        if self._pieces.shared is not None:
            for row in [each for each in self.rows if each.is_going_on]:
                yield self._go_on((row,))
        elif any(row.is_going_on for row in self.rows):
            yield self._go_on(tuple(self.rows[: self._gather()]))

    def take(self, step: Pass, found: Sequence[Found]) -> list[Event]:
        """Add what a pass has found; return the events of it."""
        events: list[Event] = []
        for each in found[: step.scored]:
            assert each.logprob is not None, "a scored prompt has log-probabilities"
            step.rows[0].logprobs.append(each.logprob)
            step.rows[0].top.append(each.top)
        if step.draws:
            for row, each in zip(step.rows, found[step.scored :], strict=True):
                events += self._add(row, each)
        elif step.rows[0].request is not None and step.rows[0].cached == len(step.rows[0].request.prompt):
            events += [self._read_prompt(step.rows[0]), self._finish(step.rows[0], "length")]
        return events

    def _read(self, row: Row, most: int) -> Pass:
        """Return the next pass over a prompt, of `most` tokens at most, and set its row to after it."""
        request = row.request
        assert request is not None
        if row.cached == row.reused and not request.scores_prompt:
            self._borrow(row)
        length, shared = len(request.prompt), self._pieces.shared
        end = length if shared is not None and length > shared else min(length, row.cached + most)
        new, row.cached, row.read_at = end - row.cached, end, max(row.read_at, end)
        scored = min(new, length - 1 - (end - new)) if request.scores_prompt else 0
        return Pass((row,), new, draws=end == length and request.sampling.max_new_tokens > 0, scored=scored)

    def _borrow(self, row: Row) -> None:
        """Copy the beginning that the prompt has in common with another row, where that is longer than what it has."""
        found = [
            (self._common(row.tokens, each), group, each)
            for group in self._groups
            for each in group.rows
            if each is not row
        ]
        common, group, source = max(found, key=lambda each: each[0], default=(0, self, row))
        if common >= row.cached + _LEAST_COPIED:
            self.memory.copy_row(row.place, group.memory, source.place, common)
            row.cached = row.reused = common

    def _common(self, prompt: Sequence[int], row: Row) -> int:
        """Return how many tokens of a prompt, its last one aside, begin a row whose keys and values hold for it."""
        most = min(len(prompt) - 1, row.cached)
        shared = self._pieces.shared
        if shared is not None and max(len(prompt), row.read_at) > shared:
            return 0
        most = most if shared is None else min(most, shared)
        return _common(prompt, row.tokens, most)

    def _gather(self) -> int:
        """Bring the rows that go on to the front; return their number."""
        count = sum(row.is_going_on for row in self.rows)
        holes = [row for row in self.rows[:count] if not row.is_going_on]
        for hole, row in zip(holes, [row for row in self.rows[count:] if row.is_going_on], strict=True):
            self.memory.swap_rows(hole.place, row.place, hole.cached, row.cached)
            hole.place, row.place = row.place, hole.place
            self.rows[hole.place], self.rows[row.place] = hole, row
        return count

    def _go_on(self, rows: tuple[Row, ...]) -> Pass:
        for row in rows:
            row.cached = len(row.tokens)
        return Pass(rows, 1, draws=True)

    def _add(self, row: Row, found: Found) -> list[Event]:
        request = row.request
        assert request is not None
        sampling = request.sampling
        if found.token == NOT_FINITE:
            failed = Failed(
                request.id,
                f"the model's logits for new token {row.num_new + 1} are not finite; its weights hold infinite values "
                "or NaN, or precision.dtype is too narrow for this text",
            )
            row.cached = 0
            self._leave(row)
            return [failed]
        events: list[Event] = [self._read_prompt(row)] if row.num_new == 0 else []
        row.num_new += 1
        row.tokens.append(found.token)
        is_told = request.top_logprobs is not None
        top = found.top[: request.top_logprobs]
        events.append(NewToken(request.id, found.token, found.logprob if is_told else None, top if is_told else ()))
        if found.token in sampling.stop_tokens:
            events.append(self._finish(row, "stop_token"))
        elif row.num_new >= sampling.max_new_tokens:
            events.append(self._finish(row, "length"))
        elif len(row.tokens) > self._context:
            events.append(self._finish(row, "context"))
        return events

    def _read_prompt(self, row: Row) -> PromptScores:
        assert row.request is not None
        return PromptScores(row.request.id, row.reused, tuple(row.logprobs), tuple(row.top))

    def _finish(self, row: Row, finish: Finish) -> Finished:
        assert row.request is not None
        finished = Finished(row.request.id, finish)
        self._leave(row)
        return finished

    def _leave(self, row: Row) -> None:
        """Free a row; its tokens stay, but for those of the ranks' own request."""
        assert row.request is not None
        if row.request.id < 0:
            row.cached = 0
        row.request, row.used, row.logprobs, row.top = None, self._clock, [], []
        if self._pieces.shared is not None:
            row.cached = min(row.cached, self._pieces.shared) if row.read_at <= self._pieces.shared else 0
        del row.tokens[row.cached :]
        if row in self._order:
            self._order.remove(row)


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return how many of the first `most` items are the same."""
    low, high = 0, most
    while low < high:  # comparing slices takes a hundredth of a loop over items
        middle = (low + high + 1) // 2
        low, high = (middle, high) if list(a[low:middle]) == list(b[low:middle]) else (low, middle - 1)
    return low
