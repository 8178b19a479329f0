"""The data engine as a whole: pages to signatures, tokens, and `trimaran prepare` on one and on more workers.

    pip install 'trimaran[data]' datatrove==0.10.0 spacy 'trafilatura<1.12' lxml_html_clean 'xxhash<4'
    python benchmarks/data_engine.py pages PAGES.jsonl.gz [--rounds 3]
    python benchmarks/data_engine.py tokens PAGES.jsonl.gz [--rounds 3] [--vocab-size 32768]
    python benchmarks/data_engine.py prepare SPEC --workers 1 2 --cache-dir NEW_FOLDER [--rounds 1]

`pages`: HTML to text, Gopher's two filters and the MinHash signature of the same pages, by our steps and by datatrove's
blocks (Trafilatura, its own word splitter), which take every eighth page. CPU-seconds of this one process.

`tokens`: the same texts by `FastEncoder` and by tokenizers' `encode_batch` and `encode_batch_fast`, on one thread; all
must give the same ids. The tokenizer is trained on them.

`prepare`: runs the command on nothing that was done before, and looks at all its processes ten times a second. Prints
the seconds until the first task begins, until the recipe is done and until the end, the peak of every process's
resident memory, and the name of the manifest, which has the hash of its content.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cpu_seconds import least_cpu_seconds

from trimaran.runtime.data.clean.steps import clean_steps
from trimaran.runtime.data.dedup import near
from trimaran.runtime.data.dedup.arrays import save_arrays
from trimaran.runtime.data.document import Document
from trimaran.runtime.data.filters.gopher import GopherFilter
from trimaran.runtime.data.filters.gopher_repetition import GopherRepetitionFilter
from trimaran.runtime.data.tokens.fast_encode import FastEncoder, why_not
from trimaran.runtime.spec.sections.clean import CleanSection
from trimaran.runtime.spec.sections.filter import GopherRepetitionSettings, GopherSettings

_EVERY = 8
_LOOK_S = 0.1


def read_pages(path: Path) -> list[str]:
    """Return the pages of a file of records with `html`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [row["html"] for row in map(json.loads, file)]


def to_texts(pages: Iterable[str]) -> list[str]:
    """Return the main content of pages, of those that have any."""
    html = clean_steps(CleanSection())[0]
    documents = [Document("", raw=page.encode()) for page in pages]
    return [document.text for document in documents if html(document, Counter()) is None and document.text]


def pages_by_ours(pages: Sequence[str], folder: Path) -> None:
    """Turn pages into text, judge each text and write the signatures of all."""
    steps = [GopherRepetitionFilter(GopherRepetitionSettings()), GopherFilter(GopherSettings())]
    texts = to_texts(pages)
    for text in texts:
        document = Document("", text)
        for step in steps:
            step(document, Counter())
    save_arrays(folder / "signatures.npz", near.band_keys(texts), {})


def pages_by_datatrove() -> Callable[[Sequence[str], Path], None]:
    """Return the same by datatrove's blocks; ImportError where a package is missing."""
    from datatrove.data import Document as Page
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import GopherQualityFilter
    from datatrove.pipeline.filters import GopherRepetitionFilter as TheirRepetitionFilter
    from loguru import logger

    logger.remove()
    for package in ("trafilatura", "spacy"):  # the blocks import them at the first page
        __import__(package)
    extract, filters = Trafilatura(), [TheirRepetitionFilter(), GopherQualityFilter()]

    def work(pages: Sequence[str], folder: Path) -> None:
        texts = [text for text in map(extract.extract, pages) if text]
        documents = [Page(text=text, id=str(number)) for number, text in enumerate(texts)]
        for document in documents:
            for each in filters:
                each.filter(document)
        MinhashDedupSignature(str(folder)).run(iter(documents), 0, 1)

    return work


def measure_pages(path: Path, rounds: int) -> None:
    """Print both sides and their ratio."""
    pages = read_pages(path)
    sides: list[tuple[str, Callable[[Sequence[str], Path], None], Sequence[str]]] = [("trimaran", pages_by_ours, pages)]
    try:
        sides.append(("datatrove", pages_by_datatrove(), pages[::_EVERY]))
    except ImportError as error:
        print(f"datatrove: {error}")
    speeds = []
    for name, work, given in sides:
        with tempfile.TemporaryDirectory() as folder:
            work(given[:3], Path(folder))  # what is loaded once
            seconds = least_cpu_seconds(lambda: work(given, Path(folder)), rounds)  # noqa: B023 - called at once
        size = sum(len(page.encode()) for page in given) / 1e6
        speeds.append(size / seconds)
        print(
            f"{name}: {len(given)} pages, {size:.1f} MB, {seconds:.2f} CPU-seconds, {speeds[-1]:.2f} MB/s", flush=True
        )
    if len(speeds) == 2:
        print(f"ratio {speeds[0] / speeds[1]:.1f}")


def measure_tokens(texts: Sequence[str], rounds: int, vocab_size: int) -> dict[str, float]:
    """Print and return the megabytes a CPU-second of each engine."""
    import tokenizers

    from trimaran.runtime.data.tokens.tokenizer import Tokenizer

    inner = tokenizers.Tokenizer.from_str(Tokenizer.train(texts, vocab_size).definition)
    why = why_not(inner)
    assert not why, why
    fast = FastEncoder(inner)

    def by_tokenizers(name: str) -> Callable[[Sequence[str]], list[list[int]]]:
        encode = getattr(inner, name)
        return lambda batch: [found.ids for found in encode(batch, add_special_tokens=False)]

    engines = {"FastEncoder": fast.encode_batch}
    engines |= {name: by_tokenizers(name) for name in ("encode_batch_fast", "encode_batch")}
    size, ids, speeds = sum(len(text.encode()) for text in texts) / 1e6, fast.encode_batch(texts), dict[str, float]()
    print(f"{len(texts)} texts, {size:.2f} MB, {sum(map(len, ids))} tokens of {inner.get_vocab_size()}")
    for name, encode in engines.items():
        assert encode(texts) == ids, f"{name} gives other ids"
        speeds[name] = size / least_cpu_seconds(lambda: encode(texts), rounds)  # noqa: B023 - called at once
        ratio = speeds["FastEncoder"] / speeds[name]
        print(f"{name}: {speeds[name]:.2f} MB a CPU-second; FastEncoder is {ratio:.1f} x")
    return speeds


class Process(NamedTuple):
    """What a process of the command took."""

    name: str
    peak_bytes: int
    cpu_seconds: float


class Prepared(NamedTuple):
    """What was seen of one preparation: seconds from its start, None for what did not happen; its processes."""

    code: int
    first_task: float | None
    recipe: float | None
    end: float
    processes: dict[int, Process]
    manifests: list[str]


def watch_command(command: Sequence[str], cache: Path) -> Prepared:
    """Run a command that prepares data into `cache`, and look at its processes until it ends."""
    begin = time.perf_counter()
    seen: dict[int, Process] = {}
    first = recipe = None
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None:
        passed = time.perf_counter() - begin
        if first is None and any((cache / "recipes" / "clean").glob(".*")):
            first = passed
        if recipe is None and any((cache / "recipes" / "manifests").glob("*/recipe.json")):
            recipe = passed
        for pid in _tree(running.pid):
            seen[pid] = _look(pid) or seen.get(pid, Process("?", 0, 0.0))
        time.sleep(_LOOK_S)
    manifests = sorted(path.name for path in (cache / "recipes" / "manifests").glob("*"))
    return Prepared(running.returncode, first, recipe, time.perf_counter() - begin, seen, manifests)


def _tree(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(each for file in files for child in _read(file).split() for each in _tree(int(child)))]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def _look(pid: int) -> Process | None:
    fields = dict(line.split(":", 1) for line in _read(Path(f"/proc/{pid}/status")).splitlines())
    times = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if "VmHWM" not in fields or len(times) < 13:
        return None
    ticks = int(times[11]) + int(times[12])
    peak = int(fields["VmHWM"].split()[0]) << 10
    return Process(fields["Name"].strip(), peak, ticks / os.sysconf("SC_CLK_TCK"))


def measure_prepare(spec: Path, workers: Sequence[int], cache: Path, rounds: int) -> None:
    """Print what each number of workers takes."""
    for number in [count for _ in range(rounds) for count in workers]:
        shutil.rmtree(cache, ignore_errors=True)
        command = ["trimaran", "prepare", str(spec), "--workers", str(number), "--set", f"data.cache_dir={cache}"]
        found = watch_command(command, cache)
        load = _read(Path("/proc/loadavg")).split()[0]
        first, recipe = found.first_task or 0.0, found.recipe or 0.0
        print(
            f"workers {number}: code {found.code}, first task after {first:.1f} s, recipe after {recipe:.1f} s "
            f"(without the start {recipe - first:.1f} s), end after {found.end:.1f} s; load {load}; "
            f"manifest {', '.join(found.manifests)}"
        )
        for pid, process in found.processes.items():
            peak = process.peak_bytes / (1 << 20)
            print(f"  {process.name} {pid}: peak {peak:.0f} MiB, {process.cpu_seconds:.1f} CPU-seconds", flush=True)


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pages", "tokens", "prepare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()
    if options.part == "prepare":
        if options.cache_dir is None or options.cache_dir.exists():
            sys.exit("--cache-dir names a folder that does not exist yet: it is emptied before each run")
        measure_prepare(options.file, options.workers, options.cache_dir, options.rounds)
        return
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    if options.part == "pages":
        measure_pages(options.file, options.rounds)
    else:
        measure_tokens(to_texts(read_pages(options.file)), options.rounds, options.vocab_size)


if __name__ == "__main__":
    main()
