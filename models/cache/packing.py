"""Sequences with common beginnings packed into one row of tokens: a tree, every token of which is computed once.

No torch. A packed batch has its tokens in the order of a walk through the tree, so a token attends to itself and to
earlier tokens whose subtree it is in. The attention of a batch is computed in units: consecutive tokens that read the
same prefix before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive tokens [start, stop) of a packed batch whose attention is computed together.

    Args:
        prefix: number of the kept prefix that all of them read; None where they begin their sequences.
        is_chain: whether each token attends to all tokens of the unit before it.
        keeps: number under which the keys of the prefix and of these tokens are kept for later units; None for none.
        room: most tokens of a unit that reads what is kept.
    """

    start: int
    stop: int
    prefix: int | None
    is_chain: bool
    keeps: int | None = None
    room: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """The tokens of a packed batch, at least one.

    Args:
        tokens: token ids.
        positions: of each token in its sequences.
        ends: the first token behind the subtree of each token.
        units: in order; together they are all tokens.
        drops: kept prefixes that no later batch reads.
        longest: tokens of the longest sequence that ends here; scaling of rotary positions may depend on it.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    ends: Sequence[int]
    units: Sequence[Unit]
    drops: Sequence[int]
    longest: int
