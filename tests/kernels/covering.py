"""Covering arrays: every pair of levels of two options occurs in some case, in far fewer cases than the product has."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Pair = frozenset[tuple[str, int]]
"""Two options, each with the index of its level."""
Impossible = Callable[[Mapping[str, Any]], bool]


def pairs_of(options: Mapping[str, Sequence[Any]], impossible: Impossible) -> set[Pair]:
    """Return every pair of levels of two options that may occur together."""
    found = set()
    for (a, levels_a), (b, levels_b) in itertools.combinations(options.items(), 2):
        for i, j in itertools.product(range(len(levels_a)), range(len(levels_b))):
            if not impossible({a: levels_a[i], b: levels_b[j]}):
                found.add(frozenset({(a, i), (b, j)}))
    return found


def covered(cases: Sequence[Mapping[str, Any]], options: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Return the pairs that occur in `cases`."""
    found = set()
    for case in cases:
        places = [(name, list(levels).index(case[name])) for name, levels in options.items()]
        found |= {frozenset(pair) for pair in itertools.combinations(places, 2)}
    return found


def covering_array(
    options: Mapping[str, Sequence[Any]], impossible: Impossible = lambda levels: False
) -> list[dict[str, Any]]:
    """Return cases that cover every possible pair, the same ones every time.

    Args:
        options: the levels of each.
        impossible: whether some levels, of any number of options, can't occur together.
    """
    missing, cases = pairs_of(options, impossible), []
    order = sorted(options, key=lambda name: -len(options[name]))
    while missing:
        first = min(missing, key=lambda pair: sorted((order.index(name), level) for name, level in pair))
        chosen = dict(first)
        for name in order:
            if name in chosen:
                continue
            gains = {
                level: sum(frozenset({(name, level), place}) in missing for place in chosen.items())
                for level in range(len(options[name]))
                if not impossible({**{n: options[n][i] for n, i in chosen.items()}, name: options[name][level]})
            }
            # Of equal levels the one that has the most pairs left anywhere.
            left = {level: sum((name, level) in pair for pair in missing) for level in gains}
            chosen[name] = max(gains, key=lambda level: (gains[level], left[level], -level))
        cases.append({name: options[name][chosen[name]] for name in options})
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
    return cases


def label(case: Mapping[str, Any]) -> str:
    """Return a case as the name of a test."""
    return ", ".join(
        f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items() if value not in (None, False)
    )
