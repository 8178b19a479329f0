"""Lines and paragraphs that occurred before in the corpus are cut; the first occurrence stays.

As CCNet does with paragraphs (Wenzek et al. 2020, section 3.2), C4 with spans of sentences (Raffel et al. 2020, section
2.2) and datatrove with both: navigation, cookie notices, licences and signatures go. A line counts where it has at
least a number of characters, so that a brace, a heading or a short answer may occur again. A paragraph is a run of
lines between blank ones; one of short lines is cut as a whole where all of it occurred before. Case and white space
make no difference. Keys have 64 bits: of ten billion lines three would be cut by chance.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.dedup.arrays import Array, Arrays, SavedArrays, save_arrays
from trimaran.runtime.data.dedup.copies import MOST_KEYS, iter_shares, repeats_among
from trimaran.runtime.data.dedup.exact import hash_all, normalize_text
from trimaran.runtime.data.dedup.names import Named
from trimaran.runtime.data.document import Counts, Removal
from trimaran.runtime.data.permutation import Int64Array


def _units(text: str, min_characters: int) -> Iterator[tuple[int, int, str]]:
    """Yield first line, line after the last, and normal form of each paragraph and each line that counts."""
    lines = [normalize_text(line) for line in text.split("\n")]
    start = 0
    while start < len(lines):
        stop = start
        while stop < len(lines) and lines[stop]:
            stop += 1
        if stop - start > 1:
            paragraph = "\n".join(lines[start:stop])
            if len(paragraph) >= min_characters:
                yield start, stop, paragraph
        for line in range(start, stop):
            if len(lines[line]) >= min_characters:
                yield line, line + 1, lines[line]
        start = stop + 1


def line_keys(texts: Iterable[str], min_characters: int) -> dict[str, Array]:
    """Return the keys of what counts in a part.

    Returns:
        `lines`: [units], the keys; `counts`: [texts], how many of them each text has.
    """
    counts: list[int] = []

    def units() -> Iterator[str]:
        for text in texts:
            counts.append(0)
            for _, _, unit in _units(text, min_characters):
                counts[-1] += 1
                yield unit

    keys = np.ascontiguousarray(hash_all(units())[:, 0])
    return {"lines": keys, "counts": np.array(counts, np.int64)}


@dataclass(frozen=True, slots=True)
class Repeats:
    """What occurred before in a part.

    Attributes:
        units: [repeats] int32, ascending: places in the part's `lines`.
        kept: [repeats] int32, the number of the document in the whole corpus that has the first occurrence.
    """

    units: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32]


def find_line_repeats(parts: Sequence[Arrays], scratch: Path, most_keys: int = MOST_KEYS) -> Iterator[Repeats]:
    """Yield for every part, in source order, what occurred before in it or in an earlier one.

    Args:
        parts: from `line_keys`.
        scratch: an empty folder for what is found of each share, which of a large corpus is more than its documents.
    """
    counts = [part["counts"] for part in parts]
    bounds = np.cumsum([0, *(each.sum() for each in counts)], dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
    shares: list[tuple[SavedArrays, Int64Array]] = []
    for keys, ordinals in iter_shares(parts, "lines", most_keys):
        repeats, firsts = repeats_among(keys, ordinals)
        kept = (np.searchsorted(begins, firsts, side="right") - 1).astype(np.int32)
        path = scratch / f"{len(shares)}.npz"
        save_arrays(path, {"repeats": repeats, "kept": kept}, {})
        shares.append((SavedArrays(path, {}), np.searchsorted(repeats, bounds)))
    for part, bound in enumerate(bounds[:-1].tolist()):
        ranges = [(saved, *stops[part : part + 2].tolist()) for saved, stops in shares]
        repeats = np.concatenate([np.zeros(0, np.int64), *(s.window("repeats", *between) for s, *between in ranges)])
        kept = np.concatenate([np.zeros(0, np.int32), *(s.window("kept", *between) for s, *between in ranges)])
        order = np.argsort(repeats)
        yield Repeats((repeats[order] - bound).astype(np.int32), kept[order])


def cut_lines(
    texts: Iterable[str], repeats: Repeats, min_characters: int, names: Named, counts: Counts
) -> Iterator[str | Removal]:
    """Yield the texts of a part without what occurred before, or why nothing is left of one.

    Args:
        texts: as given to `line_keys`.
        names: the id of every document in `repeats.kept`.
        counts: lines and bytes that are cut are added as `lines.lines` and `lines.bytes`, changed texts as
            `lines.changed`.
    """
    kept_of = dict(zip(repeats.units.tolist(), repeats.kept.tolist(), strict=True))
    unit = 0
    for text in texts:
        cut: dict[int, int] = {}
        for start, stop, _ in _units(text, min_characters):
            if unit in kept_of:
                cut.update((line, kept_of[unit]) for line in range(start, stop))
            unit += 1
        yield _without(text, cut, names, counts) if cut else text


def _without(text: str, cut: Mapping[int, int], names: Named, counts: Counts) -> str | Removal:
    gone = set(cut)
    kept: list[str] = []
    for number, line in enumerate(text.split("\n")):
        # A paragraph that is gone takes the blank lines after it along.
        if number in gone or (number - 1 in gone and not line.strip() and not (kept and kept[-1].strip())):
            gone.add(number)
        else:
            kept.append(line)
    counts["lines.lines"] += len(cut)
    left = "\n".join(kept)
    counts["lines.bytes"] += len(text.encode("utf-8", "replace")) - len(left.encode("utf-8", "replace"))
    if not left.strip():
        first = names[next(iter(cut.values()))]
        return Removal("lines.empty", f"all of it occurred before, its beginning in {first}")
    counts["lines.changed"] += 1
    return left
