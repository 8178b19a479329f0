"""Copies are found by address, text, similarity, line and substring; the first stays, and nothing else goes."""

import gzip
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from trimaran.runtime.data.dedup import copies, exact, index, lines, near, substring
from trimaran.runtime.data.dedup.arrays import Array, SavedArrays, save_arrays, window
from trimaran.runtime.data.dedup.names import Names, write_names
from trimaran.runtime.data.dedup.words import find_runs, find_words
from trimaran.runtime.data.document import Counts, Removal
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import mix64
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection, DedupSection

PAGES = Path(__file__).parents[4] / "shared" / "data" / "html-sample" / "pages.jsonl.gz"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("http://www.Example.com/a/", "https://example.com/a"),
        ("https://example.com:443/a#part", "https://example.com/a"),
        ("http://example.com:80/?q=1", "https://www.example.com?q=1"),
        ("example.com/a", "HTTPS://EXAMPLE.COM./a"),
        (" https://example.com/a\n", "https://example.com/a"),
    ],
)
def test_two_addresses_of_a_page_are_one(first: str, second: str) -> None:
    assert exact.normalize_url(first) == exact.normalize_url(second)


def test_addresses_of_different_pages_differ() -> None:
    pages = [
        "a.com/x",
        "a.com/X",
        "a.com/x?q=1",
        "a.com/x?q=2",
        "a.com:8080/x",
        "ftp://a.com/x",
        "b.a.com/x",
        "http://[",
    ]
    assert len({exact.normalize_url(page) for page in pages}) == len(pages)
    assert not exact.url_keys([""]).any()


def test_equal_texts_are_copies_whatever_their_case_and_white_space_and_blank_ones_are_none() -> None:
    texts = ["Caf\u00e9  au\n lait", "cafe\u0301 AU lait ", "cafe au lait", "", " \n"]
    found = copies.find_copies([{"texts": exact.text_keys(texts)}], "texts")
    assert found.numbers.tolist() == [1]
    assert found.kept.tolist() == [0]
    assert found.removals("exact.copy", {0: "web/a#0"}) == {1: Removal("exact.copy", "copy of web/a#0")}


@pytest.mark.parametrize("columns", [1, 2])
def test_repeats_over_many_parts_are_those_of_one_dictionary(columns: int) -> None:
    """Shares of few keys, as of a corpus that is too large for one, give the same."""
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 2**64, (300, columns), dtype=np.uint64)
    pool[0] = 0
    parts = [pool[generator.integers(0, 300, size)] for size in (200, 0, 1, 333)]
    firsts: dict[bytes, int] = {}
    want = []
    for ordinal, key in enumerate(np.concatenate(parts)):
        if key.any() and (first := firsts.setdefault(key.tobytes(), ordinal)) != ordinal:
            want.append((ordinal, first))
    arrays = [{"keys": part[:, 0] if columns == 1 else part} for part in parts]
    assert copies.find_repeats([], "keys")[0].tolist() == []
    for most_keys in (16, 1 << 20):
        repeats, kept = copies.find_repeats(arrays, "keys", most_keys)
        assert list(zip(repeats.tolist(), kept.tolist(), strict=True)) == want


def test_documents_are_named_from_disk(tmp_path: Path) -> None:
    ids = ["a#0", "", "b/\u00e9#17", "c#" + "9" * 300]
    write_names(tmp_path, iter(ids))
    with Names(tmp_path) as names, Names(tmp_path, first=2) as later:
        assert [names[number] for number in (3, 0, 1, 2)] == [ids[3], ids[0], ids[1], ids[2]]
        assert later[0] == ids[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World! Don\u2019t \u2014 \u201cstop\u201d_it.", "hello world dont stop it"),
        ("well-known e\u0301t\u00e9 co\u00adop", "well known \u00e9t\u00e9 coop"),
        ("\u65e5\u672c \u30c6x", "\u65e5 \u672c \u30c6 x"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        ("ok \u2764\ufe0f \ud800!", "ok"),
        ("... \n", ""),
    ],
)
def test_words_are_letters_digits_and_marks(text: str, words: str) -> None:
    assert find_words([text]).passage(0, len(words.split())) == words
    assert find_words([text]).offsets.tolist() == [0, len(words.split())]


def naive_shingles(text: str, length: int = 5) -> set[tuple[str, ...]]:
    """Return the runs of words of an ASCII text without apostrophes, by Python's own means."""
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[at : at + length]) for at in range(max(1, len(words) - length + 1))} - {()}


def test_runs_of_words_are_those_of_a_loop_and_equal_ones_have_equal_hashes() -> None:
    draw = random.Random(1)
    pool = ["a", "b", "abcdefgh", "abcdefghi", "x" * 70, "x" * 71, "x" * 64 + "y"]
    texts = [" ".join(draw.choices(pool, k=draw.choice([0, 1, 3, 4, 5, 6, 40]))) for _ in range(60)]
    words = find_words(texts)
    runs = find_runs(words, 5)
    by_hash: dict[int, set[tuple[str, ...]]] = {}
    for row, text in enumerate(texts):
        own = runs.hashes[runs.offsets[row] : runs.offsets[row + 1]].tolist()
        listed = text.split()
        shingles = [tuple(listed[at : at + 5]) for at in range(max(1, len(listed) - 4))] if listed else []
        assert len(own) == len(shingles)
        for key, shingle in zip(own, shingles, strict=True):
            by_hash.setdefault(key, set()).add(shingle)
    assert all(len(shingles) == 1 for shingles in by_hash.values())
    assert len(by_hash) == len(set.union(*by_hash.values()))


def families(seed: int = 3, count: int = 40) -> list[str]:
    """Return texts of which many are alike, at every similarity: for each of `count` texts some with changed words."""
    draw = random.Random(seed)
    vocabulary = [f"w{number}" for number in range(2000)]
    texts = []
    for _ in range(count):
        base = draw.choices(vocabulary, k=draw.choice([40, 120, 400]))
        for share in (0, 0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08):
            changed = [draw.choice(vocabulary) if draw.random() < share else word for word in base]
            texts.append(" ".join(changed))
    texts += ["one two three", "One, two: three!", "one two", "", "..."]
    draw.shuffle(texts)
    return texts


def real_pages() -> list[str]:
    """Return pages of which many are alike, where this host has them: a handbook in three locales, mostly English."""
    if not PAGES.exists():
        return []
    with gzip.open(PAGES) as file:
        pages = [json.loads(line)["html"] for line in file]
    texts = [re.sub(r"<(script|style).*?</\1>|<[^>]*>|&\w+;", " ", page, flags=re.DOTALL) for page in pages[::4]]
    return [re.sub("[^\x00-\x7f']", " ", text) for text in texts]


def near_copies(texts: Sequence[str], threshold: float = 0.7, parts: int = 3) -> near.NearCopies:
    """Return the near copies of texts that are cut into parts, each step as the engine calls it."""
    cuts = [len(texts) * part // parts for part in range(parts + 1)]
    pieces = [texts[start:stop] for start, stop in pairwise(cuts)]
    keys = [near.band_keys(piece) for piece in pieces]
    bands = [near.find_buckets(keys, band, most_keys=256) for band in near.BAND_NAMES]
    wanted = near.sharing_documents(bands)
    sets = [
        near.shingle_sets(piece, (wanted[(wanted >= start) & (wanted < start + len(piece))] - start).tolist())
        for piece, start in zip(pieces, cuts, strict=False)
    ]
    return near.find_near_copies(bands, near.Shingles(sets, cuts[:-1]).similarity, threshold)


def test_near_copies_against_the_similarity_of_all_pairs() -> None:
    """Promised of pairs: all at 0.75, but for one in a hundred; what is removed is like a kept one by 0.7."""
    texts = families() + families(seed=4, count=60) + real_pages()
    sets = [naive_shingles(text) for text in texts]
    having: dict[tuple[str, ...], list[int]] = {}
    for number, shingles in enumerate(sets):
        for shingle in shingles:
            having.setdefault(shingle, []).append(number)
    common = Counter(pair for numbers in having.values() for pair in combinations(numbers, 2))
    similar = {pair: shared / (len(sets[pair[0]]) + len(sets[pair[1]]) - shared) for pair, shared in common.items()}
    found = near_copies(texts)
    removed = dict(zip(found.copies.numbers.tolist(), found.copies.kept.tolist(), strict=True))
    for (number, kept), alike in zip(removed.items(), found.copies.similarity.tolist(), strict=True):
        assert kept < number
        assert kept not in removed
        assert similar[kept, number] == pytest.approx(alike)
        assert alike >= np.float32(0.7)
    left = Counter(dict.fromkeys((0.95, 0.8, 0.75), 0))
    pairs = Counter(left)
    for (first, second), alike in similar.items():
        for limit in pairs:
            pairs[limit] += alike >= limit
            left[limit] += alike >= limit and first not in removed and second not in removed
    print(f"{pairs} pairs, of which are left {left}; {len(removed)} of {len(texts)} documents removed")
    assert pairs[0.8] > 300
    assert left[0.8] == 0
    assert left[0.75] <= 0.01 * pairs[0.75]
    assert found.compared < 0.02 * len(texts) ** 2
    assert found.cut_short == 0


def test_the_bands_find_what_they_promise() -> None:
    """400 pairs at each similarity, counted as found where they share any band."""
    draw = np.random.default_rng(5)
    for similarity, least, most in ((0.5, 0.04, 0.3), (0.75, 0.98, 1), (0.8, 0.99, 1), (0.95, 1, 1)):
        common = round(2 * 150 * similarity / (1 + similarity))
        texts = []
        for _ in range(400):
            words = [f"x{number}" for number in draw.integers(0, 10**9, 300 - common)]
            texts += [" ".join(words[:150]), " ".join(words[150 - common :])]
        keys = np.stack(list(near.band_keys(texts, length=1).values()))
        found = float((keys[:, ::2] == keys[:, 1::2]).any(axis=0).mean())
        print(f"similarity {similarity}: {found:.4f} found")
        assert least <= found <= most


def test_a_chain_of_similar_documents_removes_none_that_is_far_from_what_is_kept() -> None:
    words = [f"w{number}" for number in range(400)]
    texts = [" ".join(words[start : start + 200]) for start in range(0, 200, 20)]  # neighbours 0.83, next but one 0.69
    found = near_copies(texts)
    assert found.copies.numbers.tolist() == [1, 3, 5, 7, 9]
    assert found.copies.kept.tolist() == [0, 2, 4, 6, 8]


def test_signatures_are_the_same_on_every_machine_and_in_every_version() -> None:
    """Saved ones are compared with those of later runs."""
    keys = near.band_keys(["the quick brown fox jumps over the lazy dog", ""])
    assert {int(key[1]) for key in keys.values()} == {0}
    assert len({int(key[0]) for key in keys.values()}) == 56
    assert (int(keys["band00"][0]), int(keys["band27"][0])) == (13862971140513578416, 16532843841511398966)


def test_a_document_is_compared_with_a_bounded_number_of_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_COMPARED", 10)
    numbers = np.arange(50)
    found = near.find_near_copies([{"numbers": numbers, "buckets": numbers * 0}], lambda *_: 0.5, 0.7)
    assert (len(found.copies.numbers), found.cut_short) == (0, 39)
    assert found.compared == sum(min(number, 10) for number in range(50))


def documents(texts: Sequence[str], name: str) -> Callable[[str], list[str]]:
    """Return the columns of documents with ids and addresses by their numbers."""
    rows = range(len(texts))
    columns = {"id": [f"{name}#{row}" for row in rows], "url": [f"http://{name}.org/{row}" for row in rows]}
    return lambda column: list({**columns, "text": texts}[column])


def test_documents_of_an_earlier_run_count_as_earlier_ones(tmp_path: Path) -> None:
    draw = random.Random(9)
    old = [" ".join(f"w{draw.randrange(3000)}" for _ in range(size)) for size in (100, 300, 2000)]
    new = ["something else entirely is written here today", f"{old[0]} and more", old[1].upper(), f"some {old[2]}"]
    save_arrays(tmp_path / "part-0.npz", index.index_part(documents(old[:1], "old")), index.settings())
    save_arrays(tmp_path / "part-1.npz", index.index_part(documents(old[1:], "other")), index.settings())
    earlier = index.open_index(tmp_path)
    assert [name for part in earlier for name in index.names_of(part)] == ["old#0", "other#0", "other#1"]
    own = {
        **near.band_keys(new),
        "texts": exact.text_keys(new),
        "urls": exact.url_keys([f"OTHER.org/{n}/" for n in "0189"]),
    }
    parts: list[Any] = [*earlier, own]
    assert copies.find_copies(parts, index.TEXTS).of_part(3, 7).kept.tolist() == [1]
    assert copies.find_copies(parts, index.URLS).of_part(3, 7).kept.tolist() == [1, 2]
    bands = [near.find_buckets(parts, band) for band in near.BAND_NAMES]
    rows = [number - 3 for number in near.sharing_documents(bands).tolist() if number >= 3]
    similarity = index.Similarity(earlier, near.Shingles([near.shingle_sets(new, rows)], [3]))
    found = near.find_near_copies(bands, similarity, 0.7, similarity.first_new).copies.of_part(3, 7)
    assert found.numbers.tolist() == [1, 2, 3]
    assert found.kept.tolist() == [0, 1, 2]
    assert found.similarity[0] == pytest.approx(96 / 98)


def test_an_index_of_other_settings_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    save_arrays(path, index.index_part(documents(["a b c"], "old")), index.settings(length=4))
    with pytest.raises(DataError, match="near_words 4 instead of 5"):
        index.open_index(tmp_path)
    with pytest.raises(DataError, match="has no index"):
        index.open_index(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="does not hold whole arrays"):
        index.open_index(tmp_path, length=4)


def test_saved_arrays_are_the_same_bytes_and_are_read_in_windows(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {"a": np.arange(10, dtype=np.uint64), "b": np.zeros((3, 2))}
    for name in ("x.npz", "y.npz"):
        save_arrays(tmp_path / name, arrays, {"version": 1})
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    saved = SavedArrays(tmp_path / "x.npz", {"version": 1})
    assert (saved["b"] == arrays["b"]).all()
    assert window(saved, "a", 3, 7).tolist() == window(arrays, "a", 3, 7).tolist() == [3, 4, 5, 6]
    np.savez(tmp_path / "z.npz", settings=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="does not hold"):
        SavedArrays(tmp_path / "z.npz", {"version": 1})


def test_a_sketch_of_a_long_document_estimates_its_similarity() -> None:
    draw = np.random.default_rng(2)
    shingles = np.unique(draw.integers(0, 2**64, 20_000, dtype=np.uint64))
    for kept in (0.5, 0.7, 0.9):
        other = np.sort(draw.permutation(shingles)[: int(kept * len(shingles))])
        assert index.sketch_similarity(index.sketch(shingles), other) == pytest.approx(kept, abs=0.07)
    few = np.arange(10, dtype=np.uint64) << np.uint64(40)
    assert index.sketch_similarity(index.sketch(few), few[:5]) == 0.5


def cut_lines(
    parts: Sequence[Sequence[str]], min_characters: int = 10, most_keys: int = 1 << 20
) -> tuple[list[str | Removal], Counts]:
    """Return what is left of the texts of some parts."""
    counts: Counts = Counter()
    keys = [lines.line_keys(part, min_characters) for part in parts]
    names = {number: f"doc{number}" for number in range(100)}
    left: list[str | Removal] = []
    with TemporaryDirectory() as scratch:
        for part, repeats in zip(parts, lines.find_line_repeats(keys, Path(scratch), most_keys), strict=True):
            left += lines.cut_lines(part, repeats, min_characters, names, counts)
    return left, counts


def test_lines_that_occurred_before_are_cut_and_short_ones_stay() -> None:
    first = "We use cookies here.\n\nA text of its own.\n}\n}"
    second = "Another beginning.\n\nWE  USE cookies here.\n\n}\nThe end of it."
    left, counts = cut_lines([[first], [], [second, "we use cookies here.\n"]])
    assert left == [
        first,
        "Another beginning.\n\n}\nThe end of it.",
        Removal("lines.empty", "all of it occurred before, its beginning in doc0"),
    ]
    assert counts == {"lines.lines": 2, "lines.changed": 1, "lines.bytes": 23 + 21}


def test_a_paragraph_of_short_lines_is_cut_as_a_whole() -> None:
    address = "Main Street\n12\nTown"
    left, _ = cut_lines([[f"{address}\n\nFirst text here.", f"Second text here.\n\n{address}", "Town\n12"]], 15)
    assert left == [f"{address}\n\nFirst text here.", "Second text here.\n", "Town\n12"]


def test_what_is_not_repeated_is_not_touched() -> None:
    texts = ["a line of text\n\n\n  another one  \n", "", "\n \n", "third line here"]
    assert cut_lines([texts]) == (texts, {})


@pytest.mark.parametrize("most_keys", [16, 1 << 20])
def test_repeated_lines_over_many_parts_are_those_of_one_set(most_keys: int) -> None:
    draw = random.Random(8)
    parts = [
        ["\n\n".join(f"a line that has number {draw.randrange(40)}" for _ in range(6)) for _ in range(n)]
        for n in (9, 0, 12)
    ]
    seen: dict[str, int] = {}
    want: list[str | Removal] = []
    for number, text in enumerate(text for part in parts for text in part):
        units = text.split("\n\n")
        first = next((seen[unit] for unit in units if unit in seen), None)
        left = [unit for unit in units if seen.setdefault(unit, number) == number]
        left = list(dict.fromkeys(left))  # within the text, too, the first stays
        beginning = f"all of it occurred before, its beginning in doc{first}"
        want.append("\n\n".join(left) if left else Removal("lines.empty", beginning))
    got = cut_lines(parts, 10, most_keys)[0]
    assert [text.rstrip() if isinstance(text, str) else text for text in got] == want
    assert any(isinstance(text, Removal) for text in got)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that is allocated at a time, beside what there was before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_of_comparing_lines_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    draw, parts = np.random.default_rng(0), list[SavedArrays]()
    for number in range(32):
        keys = mix64(draw.integers(0, 30_000, 8000).astype(np.uint64))  # most of them were there before
        save_arrays(tmp_path / f"{number}.npz", {"lines": keys, "counts": np.array([8000])}, {})
        parts.append(SavedArrays(tmp_path / f"{number}.npz", {}))

    def compare(count: int) -> None:
        (tmp_path / str(count)).mkdir()
        assert sum(len(found.units) for found in lines.find_line_repeats(parts[:count], tmp_path / str(count), 1 << 14))

    peaks = [peak_bytes(partial(compare, count)) for count in (8, 32)]
    assert peaks[1] < 1.5 * peaks[0]


def test_substrings_take_nine_bytes_of_memory_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substring, "_BLOCK", 1 << 12)
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(draw.choices(words, k=400)).encode() for _ in range(300)]
    size = sum(map(len, texts)) * 11 // 10
    copies_too = (text for number, text in enumerate(texts) for text in ([text, text] if number % 10 == 0 else [text]))
    assert peak_bytes(lambda: substring.find_spans(substring.Texts(copies_too), 200)) < substring.MEMORY_PER_BYTE * size


def brute_spans(texts: Sequence[bytes], size: int) -> list[tuple[int, int, int]]:
    """Return what `find_spans` promises, by a dictionary of all windows."""
    first: dict[bytes, tuple[int, int]] = {}
    found = []
    for row, text in enumerate(texts):
        cut = bytearray(len(text) + 1)
        for place in range(len(text) - size + 1):
            kept, begin = first.setdefault(text[place : place + size], (row, place))
            if (kept, begin) != (row, place):
                start = max(place, begin + size) if kept == row else place
                cut[start : place + size] = b"\1" * (place + size - start)
        for match in re.finditer(b"\1+", bytes(cut)):
            start, stop = match.span()
            while start < stop and text[start] & 0xC0 == 0x80:
                start += 1
            while start < stop < len(text) and text[stop] & 0xC0 == 0x80:
                stop -= 1
            if start < stop:
                found.append((row, start, stop))
    return found


@pytest.mark.parametrize("block", [7, 64, 1 << 19])
def test_substrings_equal_a_brute_force_count(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substring, "_BLOCK", block)
    draw = random.Random(block)
    for _ in range(20):
        size = draw.choice([16, 17, 20, 24, 30])
        pool = ["".join(draw.choices("a\u00e9\u65e5b ", k=draw.randint(5, 40))) for _ in range(6)]
        texts = ["".join(draw.choices(pool, k=draw.randint(0, 6))) for _ in range(draw.randint(0, 8))]
        encoded = [text.encode() for text in [*texts, "a" * draw.randint(0, 120), "ab" * draw.randint(0, 30)]]
        spans = substring.find_spans(substring.Texts(encoded), size)
        rows = (spans.documents.tolist(), spans.starts.tolist(), spans.ends.tolist())
        assert list(zip(*rows, strict=True)) == brute_spans(encoded, size)


def test_a_repeated_substring_is_cut_where_it_stands_again_and_its_first_place_is_named() -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy. " * 3
    texts = [text.encode() for text in (f"One: {licence}", f"Two; {licence}and more.", licence, "Three.")]
    spans = substring.find_spans(substring.Texts(texts), 200)
    counts: Counts = Counter()
    names = dict.fromkeys([0], "web#0")
    left = list(substring.cut_spans(texts[1:], spans.of_texts(1, 4), names, counts))
    assert left == [
        "Two;and more.",
        Removal("substring.empty", "all of it occurred before, its beginning in web#0"),
        "Three.",
    ]
    assert counts["substring.changed"] == 1


def test_a_corpus_too_large_for_the_memory_goes_in_groups() -> None:
    assert substring.plan_groups([5, 5, 20, 1, 1], 9 * 10) == [[0, 1], [2], [3, 4]]
    assert substring.plan_groups([], 100) == []


def test_a_part_too_large_for_the_memory_goes_in_chunks() -> None:
    texts = [letter.encode() * 30 for letter in "aabba"]
    chunks = list(substring.chunks(texts, 9 * 60))
    assert [chunk.content for chunk in chunks] == [b"".join(t + b"\xff" for t in texts[i : i + 2]) for i in (0, 2, 4)]
    assert [len(chunk) for chunk in substring.chunks(texts, 1)] == [1] * 5, "one at least"
    found = substring.Spans.of_chunks([substring.find_spans(chunk, 20) for chunk in chunks], [2, 2, 1])
    assert (found.documents.tolist(), found.kept.tolist()) == ([0, 1, 2, 3, 4], [0, 0, 2, 2, 4])


def test_the_sections_take_records_and_switches() -> None:
    section = DedupSection.model_validate({"near": {"threshold": 0.8}, "lines": True, "substring": False})
    assert section.near is not None
    assert section.near.threshold == 0.8
    assert section.lines is not None
    assert section.lines.min_characters == 30
    assert section.substring is None
    for wrong in ({"near": {"threshold": 0.5}}, {"lines": {"min_characters": 0}}, {"substring": {"min_bytes": 8}}):
        with pytest.raises(ValueError, match="validation error"):
            DedupSection.model_validate(wrong)
    assert DecontaminateSection().ngram == 13
