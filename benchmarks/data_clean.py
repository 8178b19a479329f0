"""Each step of cleaning over pages: megabytes a CPU-second, and HTML to text beside datatrove's Trafilatura block.

    python benchmarks/data_clean.py PAGES [--rounds 3]

PAGES is a .jsonl.gz of pages with a field `html`, or `text` where `html` is missing. CPU-seconds are those of this one
process, the least of the rounds. Of the steps after `html`, the megabytes are those of the text. Trafilatura takes an
eighth of the pages; without datatrove 0.10 and trafilatura below 1.12 its row says so.
"""

import argparse
import gzip
import importlib.metadata  # datatrove uses it without importing it
import json
from collections.abc import Sequence
from pathlib import Path

from cpu_seconds import least_cpu_seconds

from trimaran.runtime.data.clean.emoji import Emoji
from trimaran.runtime.data.clean.steps import clean_steps
from trimaran.runtime.data.document import Counts, Document, Step
from trimaran.runtime.spec.sections.recipe.clean import CleanSection


def measure(step: Step, documents: Sequence[Document], rounds: int) -> tuple[float, list[Document], Counts]:
    """Return the CPU-seconds of a step, the documents after it and its counts."""
    after: list[Document] = []
    counts = Counts()

    def work() -> None:
        counts.clear()
        copies = [Document(d.id, text=d.text, raw=d.raw, charset=d.charset) for d in documents]
        after[:] = [copy for copy in copies if step(copy, counts) is None]

    return least_cpu_seconds(work, rounds), after, counts


def trafilatura_seconds(pages: Sequence[str], rounds: int) -> float | str:
    """Return the CPU-seconds of datatrove's block on the pages, or why it can't run."""
    try:
        from datatrove.pipeline.extractors import Trafilatura

        importlib.import_module("trafilatura")  # the block does so at the first page
    except ImportError as error:
        return str(error)
    block = Trafilatura()

    def work() -> None:
        for page in pages:
            block.extract(page)

    return least_cpu_seconds(work, rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with gzip.open(arguments.pages, "rt", encoding="utf-8") as file:
        pages = [row.get("html", row.get("text", "")) for row in map(json.loads, file)]
    documents = [Document(str(number), raw=page.encode()) for number, page in enumerate(pages)]
    html = sum(len(document.raw) for document in documents) / 1e6
    print(f"{len(pages)} pages, {html:.1f} MB of HTML; least of {arguments.rounds} rounds\n")
    print(f"| {'step':16} | CPU-seconds | MB a CPU-second | counts |\n| --- | --- | --- | --- |")
    speed = total = 0.0
    for step in [*clean_steps(CleanSection(html="all"))[:1], *clean_steps(CleanSection(spelling="english"))]:
        size = html if step.name == "html" else sum(len(document.text.encode()) for document in documents) / 1e6
        seconds, after, counts = measure(step, documents, arguments.rounds)
        whole = step.name == "html" and not speed
        name = "html: all" if whole else step.name
        print(f"| {name:16} | {seconds:11.3f} | {size / seconds:15.1f} | {dict(counts)} |", flush=True)
        speed = size / seconds if step.name == "html" else speed
        if not whole:
            documents, total = after, total + seconds
    for action in ("name", "remove"):
        seconds, _, counts = measure(Emoji(action), documents, arguments.rounds)
        print(f"| emoji: {action:9} | {seconds:11.3f} | {size / seconds:15.1f} | {dict(counts)} |", flush=True)
    print(f"| all but emoji    | {total:11.3f} | {html / total:15.1f} | |")
    some = pages[::8]
    seconds_or_why = trafilatura_seconds(some, arguments.rounds)
    if isinstance(seconds_or_why, str):
        print(f"| Trafilatura      | - | - | {seconds_or_why} |")
        return
    theirs = sum(len(page.encode()) for page in some) / 1e6 / seconds_or_why
    print(f"| Trafilatura      | {seconds_or_why:11.3f} | {theirs:15.1f} | {len(some)} pages |")
    print(f"\nHTML to text, main content: {speed / theirs:.1f} times datatrove's Trafilatura")


if __name__ == "__main__":
    main()
