"""Works that are copies of others, by the data engine's shingles: the same book as .txt and .epub is one work."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup.near import iter_shingles
from trimaran.runtime.data.permutation import UInt64Array
from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.texts.work import Left, Work

WORK_SHARE: Final = 0.7
"""Least share of a work's five-word shingles that another work has too, for it to be a copy of it or a part of it.

Two editions of a book with other spelling share about 0.8; two plays of one author 0.01.
"""


def shingles_of(texts: Sequence[str], language: str) -> list[UInt64Array]:
    """Return the five-word shingles of each text: hashes, sorted and without repeats."""
    return list(iter_shingles(lower(text, language) for text in texts))


def find_copies_of_works(works: Sequence[Work]) -> tuple[list[Work], list[Left]]:
    """Return the works that stay, numbered anew, and those that are left out as copies.

    A work is a copy where at least WORK_SHARE of its shingles are in one that is kept; longer works are kept first,
    so that a book goes and the collection that has it stays.
    """
    sets = [next(iter(shingles_of([work.text], work.language))) for work in works]
    order = sorted(range(len(works)), key=lambda place: (-len(sets[place]), place))
    kept, copies = list[int](), dict[int, Left]()
    for place in order:
        shares = {other: share_in(sets[place], sets[other]) for other in kept}
        best = max(shares, key=lambda other: (shares[other], -other), default=None)
        if best is not None and shares[best] >= WORK_SHARE:
            what = f"{shares[best]:.0%} of it is in {works[best].file}"
            copies[place] = Left(works[place].file, "work.copy", what, 1, len(works[place].text))
        else:
            kept.append(place)
    stay = [
        Work(number, each.file, each.title, each.author, each.language, each.text, each.chapters)
        for number, each in enumerate(works[place] for place in sorted(kept))
    ]
    return stay, [copies[place] for place in sorted(copies)]


def shares_with(sets: Sequence[UInt64Array], others: Sequence[UInt64Array]) -> list[float]:
    """Return for each set the greatest share of its elements that one of the other sets has."""
    joined = np.concatenate([np.zeros(0, np.uint64), *others])
    owners = np.repeat(np.arange(len(others)), [len(each) for each in others])
    order = np.argsort(joined, kind="stable")
    joined, owners = joined[order], owners[order]
    shares = []
    for each in sets:
        first, after = np.searchsorted(joined, each, "left"), np.searchsorted(joined, each, "right")
        met = [owners[start:stop] for start, stop in zip(first.tolist(), after.tolist(), strict=True) if start < stop]
        shares.append(int(np.bincount(np.concatenate(met)).max()) / len(each) if met else 0.0)
    return shares


def share_in(shingles: UInt64Array, others: UInt64Array) -> float:
    """Return the share of a set's elements that another set has; both sorted and without repeats."""
    if not len(shingles) or not len(others):
        return 0.0
    places = np.minimum(np.searchsorted(others, shingles), len(others) - 1)
    return float((others[places] == shingles).mean())


def shares_met_before(sets: Sequence[UInt64Array]) -> npt.NDArray[np.float64]:
    """Return for each set the share of its elements that one before it has."""
    if not sets:
        return np.zeros(0)
    joined = np.concatenate(sets)
    owner = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    is_old = owner[first][inverse] < owner
    met = np.bincount(owner, weights=is_old, minlength=len(sets))
    shares: npt.NDArray[np.float64] = met / np.maximum(1, np.bincount(owner, minlength=len(sets)))
    return shares
