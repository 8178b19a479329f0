"""The data engine as a whole: pages to signatures, tokens, and `trimaran prepare` on one and on more workers.

    pip install 'trimaran[data]' datatrove==0.10.0 spacy 'trafilatura<1.12' lxml_html_clean 'xxhash<4'
    python benchmarks/data_engine.py pages PAGES.jsonl.gz [--rounds 3]
    python benchmarks/data_engine.py tokens PAGES.jsonl.gz [--rounds 3] [--vocab-size 32768]
    python benchmarks/data_engine.py corpus NEW_FOLDER --megabytes 300
    python benchmarks/data_engine.py compare NEW_FOLDER --megabytes 10000
    python benchmarks/data_engine.py prepare SPEC --workers 1 2 --cache-dir NEW_FOLDER [--rounds 1]

`pages`: HTML to text, Gopher's two filters and the MinHash signature of the same pages, by our steps and by datatrove's
blocks (Trafilatura, its own word splitter), which take every eighth page. CPU-seconds of this one process.

`tokens`: the same texts by `FastEncoder` and by tokenizers' `encode_batch` and `encode_batch_fast`, on one thread; all
must give the same ids. The tokenizer is trained on them.

`corpus`: writes so much text into a folder, a fifth of it packed, and a spec with all stages beside it. A document is
phrases of the text files of this machine in any order; three in sixteen are a copy, a near copy or quote another.

`compare`: the comparisons, which alone see keys of the whole corpus, on keys as a corpus of that size has them: 3 kB a
document, 64 bytes a line, a tenth of the documents copies, a seventh near copies, a quarter of the lines repeated.
Prints the peak of resident memory of a process for each.

`prepare`: runs the command on nothing that was done before, and looks at all its processes ten times a second. Prints
the seconds until the first task begins, until the recipe is done and until the end, the peak of every process's
resident memory, and the name of the manifest, which has the hash of its content.
"""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cpu_seconds import least_cpu_seconds

from trimaran.runtime.data.clean.steps import clean_steps
from trimaran.runtime.data.dedup import near
from trimaran.runtime.data.dedup.arrays import Arrays, SavedArrays, save_arrays
from trimaran.runtime.data.dedup.copies import find_copies
from trimaran.runtime.data.dedup.lines import find_line_repeats
from trimaran.runtime.data.document import Document
from trimaran.runtime.data.filters.gopher import GopherFilter
from trimaran.runtime.data.filters.gopher_repetition import GopherRepetitionFilter
from trimaran.runtime.data.permutation import UInt64Array, mix64
from trimaran.runtime.data.tokens.fast_encode import FastEncoder, why_not
from trimaran.runtime.spec.sections.recipe.clean import CleanSection
from trimaran.runtime.spec.sections.recipe.filter import GopherRepetitionSettings, GopherSettings

_EVERY = 8
_LOOK_S = 0.1
_PART = 16 << 20
_REMEMBERED = 4096
_PLAIN = re.compile(r"[A-Za-z' -]+")


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


def phrases_of(folders: Iterable[Path], most_bytes: int) -> list[str]:
    """Return what stands between commas and full stops in the text files of some folders."""
    phrases, size = list[str](), 0
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if size < most_bytes and path.suffix in (".txt", ".rst", ".md", ".py", ".html", "") and path.is_file():
            text = re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8", errors="ignore"))
            found = (" ".join(phrase.split()) for phrase in re.split(r"[.,;:!?()\n]\s", text))
            new = [phrase for phrase in found if 20 <= len(phrase) <= 90 and _PLAIN.fullmatch(phrase)]
            phrases += new
            size += sum(map(len, new))
    return phrases


def write_corpus(folder: Path, megabytes: int, phrases: Sequence[str]) -> None:
    """Write a corpus and its spec."""
    folder.mkdir(parents=True)
    draw, earlier = random.Random(megabytes), list[list[str]]()

    def sentences() -> list[str]:
        kind = draw.randrange(16) if earlier else 9
        old = list(draw.choice(earlier)) if kind < 2 else []
        if kind == 1:  # a near copy
            old[draw.randrange(len(old))] = "This sentence stands in this copy alone."
        count = int(draw.lognormvariate(3.2, 0.9)) + 3
        new = [f"{', '.join(draw.choices(phrases, k=draw.randint(1, 3)))}." for _ in range(count)]
        if kind == 2:  # quotes another document, and ends as many do
            new += [*draw.choice(earlier)[:8], "All rights reserved by those who wrote these words in the first place."]
        if len(earlier) < _REMEMBERED:
            earlier.append(old or new)
        else:
            earlier[draw.randrange(_REMEMBERED)] = old or new
        return old or new

    share = megabytes * 1_000_000 // 5
    for number in range(5):
        packed = number == 4
        path = folder / f"{number}.jsonl{'.gz' if packed else ''}"
        left = share
        with gzip.open(path, "wt", 1, "utf-8") if packed else path.open("w", encoding="utf-8") as file:
            while left > 0:
                lines = sentences()
                step = draw.randint(2, 5)
                text = "\n".join(" ".join(lines[start : start + step]) for start in range(0, len(lines), step))
                left -= len(text)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (folder / "items.jsonl").write_text(json.dumps({"question": " ".join(earlier[-1])}), encoding="utf-8")
    (folder / "spec.yaml").write_text(_SPEC.format(folder=folder.resolve()), encoding="utf-8")


def write_keys(folder: Path, megabytes: int) -> list[Path]:
    """Write the keys of the parts of a corpus, of which some are those of other documents and lines."""
    folder.mkdir(parents=True)
    draw, paths = np.random.default_rng(megabytes), list[Path]()
    documents, lines = _PART // 3000, _PART // 64

    def some(count: int, of: int) -> UInt64Array:
        return mix64(draw.integers(0, of, count).astype(np.uint64))

    for number in range(megabytes * 1_000_000 // _PART):
        keys = {"texts": some(2 * documents, 1 << 62).reshape(-1, 2), "lines": some(lines, 1 << 62)}
        keys["texts"][::10] = some(len(keys["texts"][::10]), 1 << 17)[:, None]
        keys["lines"][::4] = some(len(keys["lines"][::4]), 1 << 20)
        near_keys = some(len(near.BAND_NAMES) * documents, 1 << 62).reshape(-1, documents)
        near_keys[:20, ::7] = some(len(near_keys[0, ::7]), 1 << 17)
        keys |= dict(zip(near.BAND_NAMES, near_keys, strict=True))
        paths.append(folder / f"{number}.npz")
        save_arrays(paths[-1], {**keys, "counts": np.full(documents, lines // documents)}, {})
    return paths


def measure_comparisons(folder: Path, megabytes: int) -> dict[str, float]:
    """Print and return the MiB of a process that compares the keys of a corpus, for each comparison."""
    parts = [SavedArrays(path, {}) for path in write_keys(folder / "keys", megabytes)]

    def compare_near() -> None:
        bands: list[Arrays] = []
        for name in near.BAND_NAMES:
            save_arrays(folder / f"{name}.npz", near.find_buckets(parts, name), {})
            bands.append(SavedArrays(folder / f"{name}.npz", {}))
        near.find_near_copies(bands, lambda *_: 0.9, 0.7)

    def compare_lines() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for _ in find_line_repeats(parts, Path(scratch)):
                pass

    works = {"copies": lambda: find_copies(parts, "texts"), "near": compare_near, "lines": compare_lines}
    peaks = {}
    for name, work in {"nothing": lambda: None, **works}.items():
        begin = time.perf_counter()
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        _, code, used = os.wait4(child, 0)
        assert code == 0, name
        peaks[name] = used.ru_maxrss / 1024
        seconds = time.perf_counter() - begin
        print(f"{megabytes} MB, {len(parts)} parts, {name}: peak {peaks[name]:.0f} MiB, {seconds:.0f} s", flush=True)
    return peaks


_SPEC = """
data:
  corpora: {{text: {{source: [{folder}/*.jsonl*]}}}}
  clean: {{}}
  filter: {{gopher: {{max_bullet_lines: null}}, gopher_repetition: true, languages: [en], min_language_score: 0.3}}
  dedup: {{lines: true, substring: true}}
  decontaminate: {{against: [{{file: {folder}/items.jsonl, fields: [question]}}]}}
  max_lost_fraction: 1.0
  tokenizer_vocab_size: 4096
  tokenizer_train_bytes: 5_000_000
  worker_memory: 1.0
optimizer: {{lr: 0.001}}
model: {{num_layers: 1, hidden_size: 8, num_heads: 1, vocab_size: 4096}}
train: {{num_steps: 2, global_batch_size: 4, micro_batch_size: 2, seq_len: 16}}
"""


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
    parser.add_argument("part", choices=("pages", "tokens", "corpus", "compare", "prepare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--megabytes", type=int, default=300)
    options = parser.parse_args()
    if options.part == "compare":
        measure_comparisons(options.file, options.megabytes)
        return
    if options.part == "corpus":
        write_corpus(options.file, options.megabytes, phrases_of([Path("/usr/share/doc"), Path(sys.prefix)], 40 << 20))
        return
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
