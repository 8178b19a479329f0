"""From likelihood requests to packed batches: what requests have in common at their beginning becomes one computation.

The inputs of all requests form a prefix tree. A walk through it packs the tokens of whole subtrees one behind the
other, without padding, so requests need not be sorted by length. A subtree that is too large for one unit of attention
is opened: the tokens at its root are kept in the prefix cache, for its branches in this batch and in later ones. No
torch.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from trimaran.models.cache.packing import Packing, Unit
from trimaran.runtime.evaluate.engine.requests import Likelihood

UNIT_TOKENS = 192
"""Most tokens of a unit that is no chain: each attends to all of its keys, those of other branches masked."""
_WIDTH = 4  # bytes of a token in a key


@dataclass(frozen=True, slots=True)
class Target:
    """One token to score.

    Args:
        row: the token of the batch that predicts it.
        token: its id.
        request: number of the request.
        index: which token of the request's continuation it is.
    """

    row: int
    token: int
    request: int
    index: int


@dataclass(frozen=True, slots=True)
class LikelihoodBatch:
    """One forward pass: its tokens, and the targets that they predict, in the order of their rows."""

    packing: Packing
    targets: Sequence[Target]


@dataclass(frozen=True)
class Limits:
    """The size of batches.

    Args:
        tokens: most tokens of a batch; only a longer single sequence exceeds it.
        sequences: most different sequences that end in a batch; None for any number.
        shares: whether common beginnings are computed once.
        longest_shared: sequences longer than this have a batch of their own; for scalings of rotary positions that
            depend on the length.
    """

    tokens: int
    sequences: int | None = None
    shares: bool = True
    longest_shared: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"the {name} of a batch ({value}) must be at least 1")


@dataclass(slots=True, eq=False)
class _Node:
    """Tokens [start, stop) of the sequence `of` and what branches off behind them."""

    of: Sequence[int]
    start: int
    stop: int
    is_end: bool = False  # whether a sequence ends here
    children: "list[_Node]" = field(default_factory=list)
    parent: "_Node | None" = None
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)  # position, token, request, index
    size: int = 0  # tokens of the subtree
    num_ends: int = 0  # sequences that end in it
    number: int | None = None  # under which its keys are kept


def inputs_of(request: Likelihood) -> tuple[int, ...]:
    """Return the tokens that the model reads to answer: all but the last."""
    return (*request.context, *request.continuation[:-1])


def batches(requests: Sequence[Likelihood], limits: Limits, first: int = 0) -> Iterator[LikelihoodBatch]:
    """Return the batches in which all requests are answered.

    Args:
        first: number of the first request.
    """
    alone = limits.longest_shared
    order = sorted_by_tokens(requests)
    together = [number for number in order if alone is None or _length(requests[number]) <= alone]
    groups = [together, *([number] for number in order if alone is not None and _length(requests[number]) > alone)]
    kept = first  # number of the next prefix: no other batches of this evaluation have it
    for group in groups:
        if group:
            packer = _Packer(limits, kept)
            packer.add(_tree([(number + first, requests[number]) for number in group], limits.shares))
            yield from packer.finish()
            kept = packer.num_kept


def divide(requests: Sequence[Likelihood], num_parts: int) -> list[list[int]]:
    """Return the numbers of all requests in parts that take about equally long, the longest first.

    A part is cut off where its requests have least in common with the next ones. There are about `num_parts`.
    """
    order = sorted_by_tokens(requests)
    keys = [_key(requests[number]) for number in order]
    shared = [0, *(_common(a, b) for a, b in pairwise(keys))][: len(keys)]
    costs = [len(key) // _WIDTH - common + 8 for key, common in zip(keys, shared, strict=True)]
    aim = max(1, sum(costs) // max(1, num_parts))
    parts: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(order):
        cost, stop = costs[start] + shared[start], start + 1
        while stop < len(order) and cost < aim:
            cost, stop = cost + costs[stop], stop + 1
        best, extra = stop, 0
        for end in range(stop, len(order)):
            if shared[end] < shared[best]:
                best = end
            extra += costs[end]
            if extra > aim // 4:
                break
        stop = best if stop < len(order) else stop
        cost = sum(costs[start:stop]) + shared[start]
        parts.append((cost, order[start:stop]))
        start = stop
    return [part for _, part in sorted(parts, key=lambda each: -each[0])]


def sorted_by_tokens(requests: Sequence[Likelihood]) -> list[int]:
    """Return the numbers of the requests, those that begin alike side by side."""
    keys = [_key(request) for request in requests]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _length(request: Likelihood) -> int:
    return len(request.context) + len(request.continuation) - 1


def _key(request: Likelihood) -> bytes:
    """Return the inputs as bytes, which are compared at once and sort like the tokens."""
    tokens = array("I", inputs_of(request))
    if sys.byteorder == "little":
        tokens.byteswap()
    return tokens.tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Return how many tokens two keys have in common at their beginning."""
    low, high = 0, min(len(a), len(b)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * _WIDTH : middle * _WIDTH] == b[low * _WIDTH : middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low


def _tree(requests: Sequence[tuple[int, Likelihood]], shares: bool) -> _Node:
    """Return the root, which has no tokens, of the prefix tree of requests that are sorted by their tokens.

    Args:
        shares: whether different requests have nodes in common; requests of the same tokens always have.
    """
    root = _Node((), 0, 0)
    path, leaf, before = [root], root, b""
    for number, request in requests:
        key = _key(request)
        if key != before or leaf is root:
            inputs = inputs_of(request)
            common = _common(before, key) if shares else 0
            _unwind(path, common)
            leaf = _Node(inputs, common, len(inputs), is_end=True, parent=path[-1])
            path[-1].children.append(leaf)
            path.append(leaf)
            before = key
        node = leaf
        offset = len(request.context) - 1
        for index in range(len(request.continuation) - 1, -1, -1):
            while node.start > offset + index:
                assert node.parent is not None
                node = node.parent
            node.targets.append((offset + index, request.continuation[index], number, index))
    _measure(root)
    return root


def _unwind(path: list[_Node], common: int) -> None:
    """Leave the nodes of a path that begin behind `common` tokens; part the one that goes beyond."""
    while path[-1].stop > common:
        node = path.pop()
        if path[-1].stop < common:
            parent = path[-1]
            upper = _Node(node.of, node.start, common, children=[node], parent=parent)
            parent.children[-1], node.parent, node.start = upper, upper, common
            upper.targets = [each for each in node.targets if each[0] < common]
            node.targets = [each for each in node.targets if each[0] >= common]
            path.append(upper)


def _measure(root: _Node) -> None:
    """Fill in the sizes of all subtrees."""
    order = [root]
    for node in order:
        order.extend(node.children)
    for node in reversed(order):
        node.size = node.stop - node.start + sum(child.size for child in node.children)
        node.num_ends = node.is_end + sum(child.num_ends for child in node.children)


@dataclass(slots=True, eq=False)
class _Plan:
    """A unit before it is in a batch: the subtrees `roots`, or with `opens` the tokens of one node alone."""

    roots: list[_Node]
    parent: _Node
    opens: bool

    @property
    def size(self) -> int:
        return self.roots[0].stop - self.roots[0].start if self.opens else sum(node.size for node in self.roots)

    @property
    def num_ends(self) -> int:
        return int(self.roots[0].is_end) if self.opens else sum(node.num_ends for node in self.roots)


class _Packer:
    """Packs the units of trees into batches."""

    def __init__(self, limits: Limits, num_kept: int) -> None:
        self.num_kept = num_kept
        self._limits = limits
        self._plans: list[_Plan] = []

    def add(self, root: _Node) -> None:
        """Divide a tree into units, in the order of a walk through it."""
        stack: list[_Node | _Plan] = [root]
        while stack:
            node = stack.pop()
            if isinstance(node, _Plan):
                self._plans.append(node)
                if node.opens:
                    stack.append(node.roots[0])
            else:
                stack.extend(reversed(self._units_below(node)))

    def _units_below(self, parent: _Node) -> list[_Plan]:
        """Return the units of a node's branches; large branches are opened."""
        unit, most, plans = min(UNIT_TOKENS, self._limits.tokens), self._limits.sequences, list[_Plan]()
        group: list[_Node] = []
        size = ends = 0
        for node in parent.children:
            fits = node.size <= unit and (most is None or node.num_ends <= most)
            joins = fits and size + node.size <= unit and (most is None or ends + node.num_ends <= most)
            if group and not joins:
                plans.append(_Plan(group, parent, opens=False))
                group, size, ends = [], 0, 0
            if fits:
                group.append(node)
                size, ends = size + node.size, ends + node.num_ends
            else:
                plans.append(_Plan([node], parent, opens=bool(node.children)))
        if group:
            plans.append(_Plan(group, parent, opens=False))
        return plans

    def finish(self) -> Iterator[LikelihoodBatch]:
        """Return the batches of all units."""
        divided: list[list[_Plan]] = []
        size = ends = 0
        for plan in self._plans:
            most = self._limits.sequences
            full = size + plan.size > self._limits.tokens or (most is not None and ends + plan.num_ends > most)
            if not divided or full:
                divided.append([])
                size = ends = 0
            divided[-1].append(plan)
            size, ends = size + plan.size, ends + plan.num_ends
        rooms: dict[int, int] = {}  # by id of the opened node
        last: dict[int, int] = {}  # the batch that reads its keys last
        for number, plans in enumerate(divided):
            for plan in plans:
                rooms[id(plan.parent)] = max(rooms.get(id(plan.parent), 0), 0 if plan.opens else plan.size)
                last[id(plan.parent)] = number
        drops: list[list[int]] = [[] for _ in divided]
        for plans in divided:
            for plan in plans:
                if plan.opens:
                    plan.roots[0].number = self.num_kept
                    drops[last[id(plan.roots[0])]].append(self.num_kept)
                    self.num_kept += 1
        for plans, dropped in zip(divided, drops, strict=True):
            yield _batch(plans, rooms, dropped)


def _batch(plans: Sequence[_Plan], rooms: dict[int, int], drops: Sequence[int]) -> LikelihoodBatch:
    """Return the batch of these units."""
    tokens, positions, ends = array("q"), array("q"), array("q")
    units: list[Unit] = []
    targets: list[Target] = []
    longest = 0
    for plan in plans:
        first, is_chain = len(tokens), len(plan.roots) == 1
        stack = plan.roots[::-1]
        while stack:
            node = stack.pop()
            start, length = len(tokens), node.stop - node.start
            tokens.extend(node.of[node.start : node.stop])
            positions.extend(range(node.start, node.stop))
            size = length if plan.opens else node.size
            ends.extend([start + size] * length)
            targets += [Target(start + at - node.start, *rest) for at, *rest in node.targets]
            longest = max(longest, node.stop)
            if not plan.opens:
                is_chain = is_chain and len(node.children) <= 1
                stack.extend(reversed(node.children))
        keeps = plan.roots[0].number if plan.opens else None
        room = rooms[id(plan.roots[0])] if plan.opens else 0
        units.append(Unit(first, len(tokens), plan.parent.number, is_chain, keeps, room))
    targets.sort(key=lambda target: target.row)
    return LikelihoodBatch(Packing(tokens, positions, ends, units, drops, longest), targets)
