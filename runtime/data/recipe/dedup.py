"""The stages that remove copies, as functions of tasks: keys of every part, one comparison of all, and the removal.

    copies     names, keys -> compare -> apply
    near       names, keys -> buckets of each band -> what shares one -> its shingles -> compare -> apply
    lines      names, keys -> compare -> apply
    substring  names, groups of parts by suffix array -> apply

A comparison sees arrays of all parts and says, for every part, which of its documents go. Folders are handed over in
the order: those of the documents of every part, then those of earlier steps of the stage. Names are the ids of all
documents, in one file.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from trimaran.runtime.data.dedup import exact, index, lines, near, substring
from trimaran.runtime.data.dedup.arrays import Array, Arrays, SavedArrays, save_arrays
from trimaran.runtime.data.dedup.copies import Copies, find_copies
from trimaran.runtime.data.dedup.names import Names, write_names
from trimaran.runtime.data.document import Removal
from trimaran.runtime.data.engine.parts import PartWriter, Removed, count_kept, read_column, read_kept
from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.recipe.steps import size_of
from trimaran.runtime.data.recipe.tally import Tally

ARRAYS: Final = "arrays.npz"
_REMOVALS: Final = "removals-{:05d}.npz"
_COLUMNS: Final = ("numbers", "kept", "similarity")
_ROWS: Final = "rows-{:05d}.npz"
Result = dict[str, Any]


class _Shown:
    """Arrays of a part under the same names, some keys of which stand for nothing: those of documents that are gone."""

    def __init__(self, arrays: Arrays, gone: Array) -> None:
        self._arrays, self._gone = arrays, gone

    def __getitem__(self, name: str) -> Array:
        keys = self._arrays[name].copy()
        keys[self._gone] = 0
        return keys


def name_documents(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the ids of all documents: of indexes of earlier runs first. Inputs: every part, indexes."""
    del watch
    count = arguments["parts"]
    earlier = (name for part in _earlier(inputs[count:], arguments) for name in index.names_of(part))
    write_names(folder, chain(earlier, (name for part in inputs[:count] for name in read_column(part, "id"))))
    return {}


def copy_keys(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the keys by address and text of a part's documents."""
    del arguments, watch
    texts, urls = read_column(inputs[0], "text"), read_column(inputs[0], "url")
    arrays = {index.URLS: exact.url_keys(urls), index.TEXTS: exact.text_keys(texts)}
    save_arrays(folder / ARRAYS, arrays, {})
    return {}


def compare_copies(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Find copies by address, then among the others those by text; `arguments` say which, and how many parts there are.

    Inputs: documents of every part, keys of every part, names, indexes of earlier runs.
    """
    del watch
    count = arguments["parts"]
    earlier, sizes = _earlier(inputs[2 * count + 1 :], arguments), _sizes(inputs[:count])
    keys: list[Arrays] = [*earlier, *(SavedArrays(each / ARRAYS, {}) for each in inputs[count : 2 * count])]
    whole = [index.num_documents(part) for part in earlier] + sizes
    found: dict[str, Copies] = {}
    for name, wanted, reason in ((index.URLS, "url", "url.copy"), (index.TEXTS, "exact", "exact.copy")):
        if arguments[wanted]:
            copies = found[reason] = find_copies(keys, name)
            keys = [
                _Shown(part, copies.of_part(start, start + size).numbers)
                for part, start, size in zip(keys, _starts(whole), whole, strict=True)
            ]
    first_new = sum(whole) - sum(sizes)
    removed = {reason: _of_new(copies, first_new) for reason, copies in found.items()}
    return _write_removals(folder, inputs[2 * count], sizes, removed, first_new)


def near_keys(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the keys of every band of a part's documents."""
    del watch
    save_arrays(folder / ARRAYS, near.band_keys(read_column(inputs[0], "text"), arguments["words"]), {})
    return {}


def near_buckets(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the documents that share a key of one band. Inputs: keys of every part, indexes of earlier runs."""
    del watch
    count = arguments["parts"]
    keys = [SavedArrays(each / ARRAYS, {}) for each in inputs[:count]]
    parts = [*_earlier(inputs[count:], arguments), *keys]
    save_arrays(folder / ARRAYS, near.find_buckets(parts, arguments["band"]), {})
    return {}


def near_sharing(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the rows of every part's documents that share a bucket. Inputs: every band."""
    del watch
    numbers = near.sharing_documents([SavedArrays(each / ARRAYS, {}) for each in inputs])
    for part, (start, stop) in enumerate(pairwise(arguments["starts"])):
        rows = numbers[slice(*np.searchsorted(numbers, (start, stop)))] - start
        save_arrays(folder / _ROWS.format(part), {"rows": rows}, {})
    return {}


def near_shingles(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the shingles of those of a part's documents that share a bucket. Inputs: the part, what shares."""
    del watch
    rows = SavedArrays(inputs[1] / _ROWS.format(arguments["part"]), {})["rows"]
    save_arrays(
        folder / ARRAYS, near.shingle_sets(read_column(inputs[0], "text"), rows.tolist(), arguments["words"]), {}
    )
    return {}


def compare_near(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Verify the pairs. Inputs: documents of every part, shingles of every part, every band, names, indexes."""
    del watch
    count, names = arguments["parts"], 2 * arguments["parts"] + len(near.BAND_NAMES)
    sizes = _sizes(inputs[:count])
    saved = [SavedArrays(each / ARRAYS, {}) for each in inputs[count:names]]
    earlier = _earlier(inputs[names + 1 :], arguments)
    first_new = sum(index.num_documents(part) for part in earlier)
    starts = [first_new + start for start in _starts(sizes)]
    similarity = index.Similarity(earlier, near.Shingles(saved[:count], starts))
    found = near.find_near_copies(saved[count:], similarity, arguments["threshold"], first_new)
    removed = {"near.copy": _of_new(found.copies, first_new)}
    result = _write_removals(folder, inputs[names], sizes, removed, first_new)
    return {**result, "compared": found.compared, "cut_short": found.cut_short}


def apply_removals(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Remove what a comparison has found in a part. Inputs: the part, the comparison, names. Returns the tally."""
    del watch
    saved = SavedArrays(inputs[1] / _REMOVALS.format(arguments["part"]), {})
    gone: dict[int, Removal] = {}
    with Names(inputs[2]) as names:
        for reason in arguments["reasons"]:
            gone |= Copies(*(saved[f"{reason} {name}"] for name in _COLUMNS)).removals(reason, names)
    results = (gone.get(row, "") for row in range(count_kept(inputs[0])))
    return _write(folder, inputs[0], results, Tally(), arguments["stage"])


def line_keys(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the keys of a part's lines and paragraphs."""
    del watch
    texts = read_column(inputs[0], "text")
    save_arrays(folder / ARRAYS, lines.line_keys(texts, arguments["min_characters"]), {})
    return {}


def compare_lines(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Find what occurred before. Inputs: keys of every part."""
    del arguments, watch
    keys = [SavedArrays(each / ARRAYS, {}) for each in inputs]
    with TemporaryDirectory(dir=folder) as scratch:
        for number, repeats in enumerate(lines.find_line_repeats(keys, Path(scratch))):
            save_arrays(folder / f"{number:05d}.npz", {"units": repeats.units, "kept": repeats.kept}, {})
    return {}


def apply_lines(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Cut the lines of a part that occurred before. Inputs: the part, the comparison, names. Returns the tally."""
    del watch
    least, tally = arguments["min_characters"], Tally()
    saved = SavedArrays(inputs[1] / f"{arguments['part']:05d}.npz", {})
    repeats = lines.Repeats(saved["units"], saved["kept"])
    with Names(inputs[2]) as names:
        texts = read_column(inputs[0], "text")
        results = lines.cut_lines(texts, repeats, least, names, tally.counts)
        return _write(folder, inputs[0], results, tally, "lines")


def find_substrings(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Find the substrings of a group's documents that occurred before in the group. Inputs: its parts.

    Returns how many chunks there were: one, unless a part alone is too large for the memory.
    """
    del watch
    texts = (text.encode() for each in inputs for text in read_column(each, "text"))
    found, chunk_sizes = list[substring.Spans](), list[int]()
    for chunk in substring.chunks(texts, arguments["memory_bytes"]):
        found.append(substring.find_spans(chunk, arguments["min_bytes"]))
        chunk_sizes.append(len(chunk))
    spans, sizes = substring.Spans.of_chunks(found, chunk_sizes), _sizes(inputs)
    for number, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        mine = spans.of_texts(start, start + size)
        arrays = {name: getattr(mine, name) for name in ("documents", "starts", "ends", "kept")}
        save_arrays(folder / f"{number:05d}.npz", arrays, {})
    return {"chunks": len(found)}


def apply_substrings(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Cut the substrings of a part. Inputs: the part, its group's findings, names. Returns the tally."""
    del watch
    tally = Tally()
    saved = SavedArrays(inputs[1] / f"{arguments['part_of_group']:05d}.npz", {})
    spans = substring.Spans(*(saved[each] for each in ("documents", "starts", "ends", "kept")))
    with Names(inputs[2], arguments["first_of_group"]) as names:
        texts = (text.encode() for text in read_column(inputs[0], "text"))
        return _write(folder, inputs[0], substring.cut_spans(texts, spans, names, tally.counts), tally, "substring")


def write_index(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the index of a part's documents, for later runs to compare with."""
    del watch
    arrays = index.index_part(partial(read_column, inputs[0]), arguments["words"])
    save_arrays(folder / ARRAYS, arrays, index.settings(arguments["words"]))
    return {"documents": index.num_documents(arrays)}


def _earlier(folders: Sequence[Path], arguments: Mapping[str, Any]) -> list[SavedArrays]:
    return [SavedArrays(each / ARRAYS, index.settings(arguments["words"])) for each in folders]


def _sizes(parts: Sequence[Path]) -> list[int]:
    return [count_kept(part) for part in parts]


def _starts(sizes: Sequence[int]) -> list[int]:
    starts: list[int] = np.cumsum([0, *sizes], dtype=np.int64)[:-1].tolist()
    return starts


def _of_new(copies: Copies, first_new: int) -> Copies:
    """Return the copies among this run's documents, which have the numbers from `first_new` on."""
    chosen = copies.numbers >= first_new
    return Copies(copies.numbers[chosen], copies.kept[chosen], copies.similarity[chosen])


def _write_removals(
    folder: Path, names_folder: Path, sizes: Sequence[int], found: Mapping[str, Copies], first_new: int
) -> Result:
    """Write for every part which rows go and why; return the largest clusters."""
    for part, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        first, arrays = first_new + start, dict[str, Array]()
        for reason, copies in found.items():
            mine = copies.of_part(first, first + size)
            arrays |= {f"{reason} {name}": getattr(mine, name) for name in _COLUMNS}
        save_arrays(folder / _REMOVALS.format(part), arrays, {})
    kept = np.concatenate([np.zeros(0, np.int64), *(copies.kept for copies in found.values())])
    numbers, counts = np.unique(kept, return_counts=True)
    largest = np.lexsort((numbers, -counts))[:_MOST_CLUSTERS]
    rows = zip(numbers[largest].tolist(), counts[largest].tolist(), strict=True)
    with Names(names_folder) as names:
        return {"clusters": [{"kept": names[number], "copies": count} for number, count in rows]}


_MOST_CLUSTERS: Final = 20


def _write(folder: Path, part: Path, results: Iterable[str | Removal], tally: Tally, stage: str) -> Result:
    """Write a part anew: each result is a document's text, "" for the same as before, or why it is removed."""
    with PartWriter(folder) as writer:
        for document, result in zip(read_kept(part), results, strict=True):
            size = size_of(document)
            tally.enter(size)
            if isinstance(result, Removal):
                tally.remove(size, document.corpus, document.language, result.reason)
                writer.remove(Removed.of(document, stage, result))
                continue
            document.text = result or document.text
            tally.keep(size_of(document), document.corpus, document.language, document.fields)
            writer.keep(document)
    return tally.record
