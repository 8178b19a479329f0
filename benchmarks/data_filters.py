"""The filters' CPU-seconds against datatrove's blocks, on the same texts in one process.

    python benchmarks/data_filters.py [--rounds 3] [PAGES.jsonl[.gz] ...]

A page is a record with `text`, or with `html`, which resiliparse turns into text first. Without files the texts are
those of Python's documentation. Needs datatrove 0.10, and spacy for its own word splitter; without spacy those columns
are empty. Finding the words counts on both sides; datatrove too remembers those of the last texts.

Prints for each filter, and for Gopher's two and all four in a row as a recipe runs them: megabytes of text a
CPU-second, datatrove's with its own words, the ratio, the same with our words, and on how many of the texts the two
agree.
"""

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datatrove.data import Document as Page
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import split_into_parts
from datatrove.utils.word_tokenizers import WordTokenizer
from resiliparse.extract.html2text import extract_plain_text

from trimaran.runtime.data.document import Document, Step
from trimaran.runtime.data.filters.c4 import C4Filter
from trimaran.runtime.data.filters.fineweb import FineWebFilter
from trimaran.runtime.data.filters.gopher import GopherFilter
from trimaran.runtime.data.filters.gopher_repetition import GopherRepetitionFilter as RepetitionFilter
from trimaran.runtime.data.filters.words import lines_of, split_sentences, split_words, words_of
from trimaran.runtime.spec.sections.recipe.filter import (
    C4Settings,
    FineWebSettings,
    GopherRepetitionSettings,
    GopherSettings,
)

GOPHER = ("gopher_repetition", "gopher")
ROWS = (("gopher_repetition",), ("gopher",), ("c4",), ("fineweb",), GOPHER, (*GOPHER, "c4", "fineweb"))


class OurWords(WordTokenizer):  # type: ignore[misc]
    """Our words and sentences, for datatrove."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words."""
        return split_words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences."""
        return split_sentences(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return where the sentences are."""
        stops = [0]
        for sentence in split_sentences(text):
            stops.append(text.index(sentence, stops[-1]) + len(sentence))
        return list(zip([0, *stops[1:-1]], stops[1:], strict=True))


def ours() -> dict[str, Step]:
    """Return our filters with the papers' thresholds."""
    return {
        "gopher_repetition": RepetitionFilter(GopherRepetitionSettings()),
        "gopher": GopherFilter(GopherSettings()),
        "c4": C4Filter(C4Settings()),
        "fineweb": FineWebFilter(FineWebSettings()),
    }


def theirs(language: Any) -> dict[str, BaseFilter]:
    """Return datatrove's filters with the papers' thresholds, for a language or with a word splitter."""
    return {
        "gopher_repetition": GopherRepetitionFilter(language=language),
        "gopher": GopherQualityFilter(language=language),
        "c4": C4QualityFilter(language=language),
        "fineweb": FineWebQualityFilter(language=language),
    }


def texts_of(files: Sequence[str]) -> list[str]:
    """Return the texts to judge; datatrove can't judge empty ones."""
    if not files:
        return list(topics.values())
    texts = []
    for file in map(Path, files):
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            for record in map(json.loads, lines):
                html = record.get("html")
                texts.append(record["text"] if html is None else extract_plain_text(html, main_content=True))
    return [text for text in texts if text]


def measure(judge: Callable[[str], str], texts: Sequence[str], rounds: int) -> tuple[float, list[str]]:
    """Return the fewest CPU-seconds of a round, and the name of the filter that removed each text, "" for none."""
    seconds = []
    for _ in range(rounds):
        for cache in (words_of, lines_of, split_into_parts):
            cache.cache_clear()
        begin = time.process_time()
        verdicts = [judge(text) for text in texts]
        seconds.append(time.process_time() - begin)
    return min(seconds), verdicts


def by_ours(names: Sequence[str]) -> Callable[[str], str]:
    """Return what judges a text by our filters."""
    steps = [step for name, step in ours().items() if name in names]

    def judge(text: str) -> str:
        document = Document("", text)
        return next((step.name for step in steps if step(document, Counter()) is not None), "")

    return judge


def by_theirs(names: Sequence[str], language: Any) -> Callable[[str], str]:
    """Return what judges a text by datatrove's filters."""
    blocks = {name: block for name, block in theirs(language).items() if name in names}

    def judge(text: str) -> str:
        page = Page(text=text, id="")
        return next((name for name, block in blocks.items() if block.filter(page) is not True), "")

    return judge


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="PAGES.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=None, help="judge the first ones alone")
    parser.add_argument("--our-words", action="store_true", help="leave out datatrove's own words, which take longest")
    args = parser.parse_args(arguments)
    texts = texts_of(args.files)[: args.texts]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    languages: dict[str, Any] = {"its": "en" if find_spec("spacy") and not args.our_words else None, "our": OurWords()}
    by_ours(GOPHER)(texts[0])  # tables of characters
    print(f"{len(texts)} texts, {size:.2f} MB")
    print("| filters | MB/s | its words: MB/s | ratio | same verdicts | our words: MB/s | ratio | same verdicts |")
    print("|---|---|---|---|---|---|---|---|")
    for names in ROWS:
        seconds, verdicts = measure(by_ours(names), texts, args.rounds)
        cells = [", ".join(names), f"{size / seconds:.1f}"]
        for language in languages.values():
            if language is None:
                cells += ["", "", ""]
                continue
            their_seconds, their_verdicts = measure(by_theirs(names, language), texts, 1)
            same = sum(one == other for one, other in zip(verdicts, their_verdicts, strict=True))
            cells += [f"{size / their_seconds:.2f}", f"{their_seconds / seconds:.1f}", f"{same} of {len(texts)}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
