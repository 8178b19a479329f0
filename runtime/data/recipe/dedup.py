"""The stages that remove copies, as functions of tasks: keys of every part, one comparison of all, and the removal.

    copies     url and exact: keys -> compare -> apply
    near       keys -> buckets of each band -> what shares one -> its shingles -> compare -> apply
    lines      keys -> compare -> apply
    substring  groups of parts by suffix array -> apply

A comparison sees arrays of all parts and says, for every part, which of its documents go. Folders are handed over in
the order: those of the documents of every part, then those of earlier steps of the stage.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from trimaran.runtime.data.dedup import exact, index, lines, near, substring
from trimaran.runtime.data.dedup.arrays import Array, Arrays, SavedArrays, save_arrays
from trimaran.runtime.data.dedup.copies import Copies, find_copies, name_documents
from trimaran.runtime.data.document import Removal
from trimaran.runtime.data.engine.parts import PartWriter, Removed, count_kept, read_column, read_kept
from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.recipe.steps import size_of
from trimaran.runtime.data.recipe.tally import Tally
from trimaran.runtime.files import read_json

ARRAYS: Final = "arrays.npz"
_REMOVALS: Final = "removals-{:05d}.json"
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


def copy_keys(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the keys by address and text of a part's documents."""
    del arguments, watch
    texts, urls = read_column(inputs[0], "text"), read_column(inputs[0], "url")
    arrays = {index.URLS: exact.url_keys(urls), index.TEXTS: exact.text_keys(texts)}
    save_arrays(folder / ARRAYS, arrays, {})
    return {}


def compare_copies(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Find copies by address, then among the others those by text; `arguments` say which, and how many parts there are.

    Inputs: documents of every part, keys of every part, indexes of earlier runs.
    """
    del watch
    count = arguments["parts"]
    documents, earlier, sizes = inputs[:count], _earlier(inputs[2 * count :], arguments), _sizes(inputs[:count])
    keys: list[Arrays] = [*earlier, *(SavedArrays(each / ARRAYS, {}) for each in inputs[count : 2 * count])]
    whole = [index.num_documents(part) for part in earlier] + sizes
    found: list[tuple[str, Copies]] = []
    for name, wanted, reason in ((index.URLS, "url", "url.copy"), (index.TEXTS, "exact", "exact.copy")):
        if arguments[wanted]:
            copies = find_copies(keys, name)
            found.append((reason, copies))
            keys = [
                _Shown(part, copies.of_part(start, start + size).numbers)
                for part, start, size in zip(keys, _starts(whole), whole, strict=True)
            ]
    first_new = sum(whole) - sum(sizes)
    return _write_removals(folder, documents, earlier, sizes, [(r, _of_new(c, first_new)) for r, c in found], first_new)


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
    """Verify the pairs. Inputs: documents of every part, shingles of every part, every band, indexes."""
    del watch
    count, bands = arguments["parts"], len(near.BAND_NAMES)
    documents, sizes = inputs[:count], _sizes(inputs[:count])
    saved = [SavedArrays(each / ARRAYS, {}) for each in inputs[count : 2 * count + bands]]
    earlier = _earlier(inputs[2 * count + bands :], arguments)
    first_new = sum(index.num_documents(part) for part in earlier)
    starts = [first_new + start for start in _starts(sizes)]
    similarity = index.Similarity(earlier, near.Shingles(saved[:count], starts))
    found = near.find_near_copies(saved[count:], similarity, arguments["threshold"], first_new)
    copies = [("near.copy", _of_new(found.copies, first_new))]
    result = _write_removals(folder, documents, earlier, sizes, copies, first_new)
    return {**result, "compared": found.compared, "cut_short": found.cut_short}


def apply_removals(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Remove what a comparison has found in a part. Inputs: the part, the comparison. Returns the tally."""
    del watch
    removals = read_json(inputs[1] / _REMOVALS.format(arguments["part"]))
    gone = {int(row): Removal(*removal) for row, removal in removals.items()}
    results = (gone.get(row, "") for row in range(count_kept(inputs[0])))
    return _write(folder, inputs[0], lambda: results, Tally(), arguments["stage"])


def line_keys(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the keys of a part's lines and paragraphs."""
    del watch
    texts = read_column(inputs[0], "text")
    save_arrays(folder / ARRAYS, lines.line_keys(texts, arguments["min_characters"]), {})
    return {}


def compare_lines(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Find what occurred before. Inputs: documents of every part, keys of every part."""
    del watch
    count = arguments["parts"]
    sizes = _sizes(inputs[:count])
    keys = [SavedArrays(each / ARRAYS, {}) for each in inputs[count:]]
    for number, repeats in enumerate(lines.find_line_repeats(keys)):
        names = name_documents(repeats.kept.astype(np.int64), sizes, lambda part: list(read_column(inputs[part], "id")))
        save_arrays(folder / f"{number:05d}.npz", {"units": repeats.units, "kept": repeats.kept}, {})
        _write_json(folder / f"{number:05d}.json", names)
    return {}


def apply_lines(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Cut the lines of a part that occurred before. Inputs: the part, the comparison. Returns the tally."""
    del watch
    name, tally = f"{arguments['part']:05d}", Tally()
    saved = SavedArrays(inputs[1] / f"{name}.npz", {})
    repeats = lines.Repeats(saved["units"], saved["kept"])
    names = _read_names(inputs[1] / f"{name}.json")
    least = arguments["min_characters"]
    texts = read_column(inputs[0], "text")
    return _write(
        folder, inputs[0], lambda: lines.cut_lines(texts, repeats, least, names, tally.counts), tally, "lines"
    )


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
    names = name_documents(spans.kept, sizes, lambda part: list(read_column(inputs[part], "id")))
    for number, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        mine = spans.of_texts(start, start + size)
        arrays = {name: getattr(mine, name) for name in ("documents", "starts", "ends", "kept")}
        save_arrays(folder / f"{number:05d}.npz", arrays, {})
        kept = set(mine.kept.tolist())
        _write_json(folder / f"{number:05d}.json", {row: name for row, name in names.items() if row in kept})
    return {"chunks": len(found)}


def apply_substrings(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Cut the substrings of a part. Inputs: the part, its group's findings. Returns the tally."""
    del watch
    name, tally = f"{arguments['part_of_group']:05d}", Tally()
    saved = SavedArrays(inputs[1] / f"{name}.npz", {})
    spans = substring.Spans(*(saved[each] for each in ("documents", "starts", "ends", "kept")))
    names = _read_names(inputs[1] / f"{name}.json")
    texts = (text.encode() for text in read_column(inputs[0], "text"))
    return _write(folder, inputs[0], lambda: substring.cut_spans(texts, spans, names, tally.counts), tally, "substring")


def write_index(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the index of a part's documents, for later runs to compare with."""
    del watch
    arrays = index.index_part(list(read_kept(inputs[0])), arguments["words"])
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
    folder: Path,
    documents: Sequence[Path],
    earlier: Sequence[SavedArrays],
    sizes: Sequence[int],
    found: Sequence[tuple[str, Copies]],
    first_new: int,
) -> Result:
    """Write for every part which rows go and why; return the largest clusters."""
    kept = np.concatenate([np.zeros(0, np.int64), *(copies.kept for _, copies in found)])
    before = [index.num_documents(part) for part in earlier]

    def ids(part: int) -> Sequence[str]:
        here = part - len(earlier)
        return index.names_of(earlier[part]) if here < 0 else list(read_column(documents[here], "id"))

    names = name_documents(kept, [*before, *sizes], ids)
    for part, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        removals: dict[int, Removal] = {}
        for reason, copies in found:
            first = first_new + start
            removals |= copies.of_part(first, first + size).removals(reason, names)
        _write_json(folder / _REMOVALS.format(part), removals)
    numbers, counts = np.unique(kept, return_counts=True)
    largest = np.lexsort((numbers, -counts))[:_MOST_CLUSTERS]
    rows = zip(numbers[largest].tolist(), counts[largest].tolist(), strict=True)
    return {"clusters": [{"kept": names[number], "copies": count} for number, count in rows]}


_MOST_CLUSTERS: Final = 20


def _write(folder: Path, part: Path, results: Callable[[], Any], tally: Tally, stage: str) -> Result:
    """Write a part anew: each result is a document's text, "" for the same as before, or why it is removed."""
    with PartWriter(folder) as writer:
        for document, result in zip(read_kept(part), results(), strict=True):
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


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")


def _read_names(path: Path) -> dict[int, str]:
    return {int(number): name for number, name in read_json(path).items()}
