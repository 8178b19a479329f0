"""Near deduplication of the same documents by trimaran and by datatrove's MinHash: CPU-seconds, and what each removes.

    pip install 'trimaran[data]' datatrove==0.10.0 spacy 'xxhash<4'
    python benchmarks/data_dedup.py [FILE.jsonl ...] [--documents 2000] [--rounds 3]

Files have one record a line with the field `text`; without any, documents of random words are made. Both sides run in
this process, end to end: signatures to disk, buckets, clusters, and which documents stay. Prints the median CPU-seconds
of each and their ratio, then the pairs that only one side takes for near copies, by their exact similarity (words as
ours). datatrove decides by its hashes alone, so it takes pairs below 0.7 and misses some above; its words are spaCy's.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.runtime.data.dedup import near
from trimaran.runtime.data.dedup.arrays import SavedArrays, save_arrays

THRESHOLD = 0.7
_SETTINGS = {"benchmark": 1}
_PART = 512


def read_texts(files: Sequence[str], most: int) -> list[str]:
    """Return up to `most` texts of the files, or as many that are made up: a third are near copies of others."""
    if files:
        lines = (line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines())
        return [json.loads(line)["text"] for line, _ in zip(lines, range(most), strict=False)]
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)]
    texts: list[str] = []
    while len(texts) < most:
        words = draw.choices(vocabulary, k=draw.randint(50, 1500))
        for share in (0.0, 0.03)[: 1 + (draw.random() < 0.5)]:
            texts.append(" ".join(draw.choice(vocabulary) if draw.random() < share else word for word in words))
    return texts[:most]


def ours(texts: Sequence[str], folder: Path) -> set[int]:
    """Return the documents that stay, by the steps of the engine."""
    parts = [texts[start : start + _PART] for start in range(0, len(texts), _PART)]
    starts = list(range(0, len(texts), _PART))
    for number, part in enumerate(parts):
        save_arrays(folder / f"keys-{number}.npz", near.band_keys(part), _SETTINGS)
    keys = [SavedArrays(folder / f"keys-{number}.npz", _SETTINGS) for number in range(len(parts))]
    for band in near.BAND_NAMES:
        save_arrays(folder / f"{band}.npz", near.find_buckets(keys, band), _SETTINGS)
    bands = [SavedArrays(folder / f"{band}.npz", _SETTINGS) for band in near.BAND_NAMES]
    wanted = near.sharing_documents(bands)
    for number, (part, start) in enumerate(zip(parts, starts, strict=True)):
        rows = wanted[(wanted >= start) & (wanted < start + len(part))] - start
        save_arrays(folder / f"sets-{number}.npz", near.shingle_sets(part, rows.tolist()), _SETTINGS)
    sets = [SavedArrays(folder / f"sets-{number}.npz", _SETTINGS) for number in range(len(parts))]
    found = near.find_near_copies(bands, near.Shingles(sets, starts).similarity, THRESHOLD)
    return set(range(len(texts))) - set(found.copies.numbers.tolist())


def theirs(texts: Sequence[str], folder: Path) -> set[int]:
    """Return the documents that datatrove's four steps let stay."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    places = [str(folder / name) for name in ("signatures", "buckets", "removed")]
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    signature = MinhashDedupSignature(places[0])
    signature.run(iter(documents), 0, 1)
    for bucket in range(near.BANDS):
        MinhashDedupBuckets(places[0], places[1]).run(None, bucket, near.BANDS)
    MinhashDedupCluster(places[1], places[2]).run(None, 0, 1)
    return {int(document.id) for document in MinhashDedupFilter(places[2]).run(iter(documents), 0, 1)}


def cpu_seconds(side: Callable[[Sequence[str], Path], set[int]], texts: Sequence[str]) -> tuple[float, set[int]]:
    """Return what one run takes in this process, and the documents that stay."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        stay = side(texts, Path(folder))
        return time.process_time() - begin, stay


def pairs_of(keys: Any) -> set[tuple[int, int]]:
    """Return the pairs of documents that share a key of a band; keys: [bands, documents], None for no document."""
    pairs: set[tuple[int, int]] = set()
    for band in keys:
        groups: dict[Any, list[int]] = {}
        for number, key in enumerate(band):
            if key:
                groups.setdefault(key, []).append(number)
        pairs.update(pair for group in groups.values() for pair in combinations(group, 2))
    return pairs


def compare_pairs(texts: Sequence[str]) -> None:
    """Print the pairs that only one side takes for near copies, counted by their exact similarity."""
    from datatrove.pipeline.dedup import MinhashDedupSignature

    shingles = near.Shingles([near.shingle_sets(texts, range(len(texts)))], [0])
    mine = {
        pair
        for pair in pairs_of([band.tolist() for band in near.band_keys(texts).values()])
        if shingles.similarity(*pair) >= THRESHOLD
    }
    with tempfile.TemporaryDirectory() as folder:
        signature = MinhashDedupSignature(folder)
        rows = [signature.get_shingles(text) for text in texts]
        signed = [signature.get_signature(row) if row.size else [None] * near.BANDS for row in rows]
    other = pairs_of([[tuple(row[band]) if row[band] else None for row in signed] for band in range(near.BANDS)])
    print(f"pairs: {len(mine & other)} both, {len(mine - other)} ours alone, {len(other - mine)} datatrove alone")
    for name, alone in (("ours", mine - other), ("datatrove", other - mine)):
        counts = Counter(float(np.floor(shingles.similarity(*pair) * 20) / 20) for pair in alone)
        print(f"  {name} alone, by similarity from: {dict(sorted(counts.items()))}")


def main() -> None:
    """Measure both sides in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.jsonl")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        import datatrove.pipeline.dedup  # noqa: F401 - it sets up its logger
        from loguru import logger
    except ImportError:
        sys.exit("datatrove is not installed; run: pip install datatrove spacy 'xxhash<4'")
    logger.remove()
    texts = read_texts(arguments.files, arguments.documents)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    warm = texts[:20]  # datatrove loads its tokenizer, and both import what they use, outside the measured time
    ours(warm, Path(tempfile.mkdtemp()))
    theirs(warm, Path(tempfile.mkdtemp()))
    times: dict[str, list[float]] = {"trimaran": [], "datatrove": []}
    stay: dict[str, set[int]] = {}
    for _ in range(arguments.rounds):
        for name, side in (("trimaran", ours), ("datatrove", theirs)):
            seconds, stay[name] = cpu_seconds(side, texts)
            times[name].append(seconds)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    print(f"{len(texts)} documents, {megabytes:.1f} MB")
    for name, seconds in medians.items():
        print(f"  {name}: {seconds:.2f} CPU-seconds, {megabytes / seconds:.2f} MB/s, {len(stay[name])} documents stay")
    print(f"  ratio {medians['datatrove'] / medians['trimaran']:.1f}")
    compare_pairs(texts)


if __name__ == "__main__":
    main()
