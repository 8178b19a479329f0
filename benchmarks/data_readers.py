"""Reading a web archive: the pages of a .warc.gz by our reader, beside warcio's.

    python benchmarks/data_readers.py [--pages 1000] [--rounds 7] [--seed 0]

The archive is made up: each page has a request and a metadata record beside it and a gzip member a record, as Common
Crawl's have. The lengths of pages are log-normal with a median of 40 kB and a mean of about 85 kB. Their words are as
frequent as Zipf's law has them and stand among tags; gzip packs them to a seventh (Common Crawl's: to a fifth). Both
sides read every record, decode the body of every response and look at its URL and content type; what they found is
compared. The rounds take turns, in one process; a figure is the median of CPU-seconds.
"""

import argparse
import gzip
import hashlib
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from warcio.archiveiterator import ArchiveIterator

from trimaran.runtime.data.document import Document
from trimaran.runtime.data.readers.part import Part, ReadSettings
from trimaran.runtime.data.readers.read import read_part

Read = Callable[[Path], tuple[int, int, str]]


def make_page(source: random.Random, words: list[str], weights: list[float]) -> bytes:
    """Return a page of made-up words."""
    size, pieces = (
        int(source.lognormvariate(10.6, 1.2)),
        ["<!DOCTYPE html><html><head><title>A page</title></head><body>"],
    )
    names = source.choices(words, cum_weights=weights, k=8)
    while size > 0:
        text = " ".join(source.choices(words, cum_weights=weights, k=source.randint(1, 12)))
        kind, name = source.choices(names, k=2)
        pieces.append(
            f'<div class="item item-{kind} {name}-list__entry"><a class="item__link {kind}-link" target="_blank" '
            f'href="https://www.example.org/{kind}/{name}/{source.randint(1, 99)}.html"><span>{text}</span></a></div>\n'
        )
        size -= len(pieces[-1])
    return "".join([*pieces, "</body></html>"]).encode()


def make_archive(path: Path, pages: int, seed: int) -> None:
    """Write an archive."""
    source = random.Random(seed)
    words = ["".join(source.choices("etaoinshrdlucmfwypvbgkqjxz", k=source.randint(2, 10))) for _ in range(5000)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))

    def record(kind: str, block: bytes, content_type: str, number: int) -> bytes:
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
            f"WARC-Record-ID: <urn:uuid:{source.getrandbits(128):032x}>\r\nContent-Length: {len(block)}\r\n"
            f"Content-Type: {content_type}\r\nWARC-Warcinfo-ID: <urn:uuid:0>\r\nWARC-IP-Address: 192.0.2.1\r\n"
            f"WARC-Target-URI: http://example.org/{number}\r\nWARC-Payload-Digest: sha1:AAAA\r\n\r\n"
        )
        return gzip.compress(head.encode() + block + b"\r\n\r\n", 6)

    with path.open("wb") as file:
        for number in range(pages):
            page = make_page(source, words, weights)
            request = b"GET / HTTP/1.1\r\nUser-Agent: crawler\r\nHost: example.org\r\nAccept: text/html\r\n\r\n"
            answer = b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
            answer += b"Content-Type: text/html; charset=utf-8\r\nCache-Control: private\r\nContent-Length: %d\r\n\r\n"
            file.write(record("request", request, "application/http; msgtype=request", number))
            file.write(record("response", answer % len(page) + page, "application/http; msgtype=response", number))
            file.write(record("metadata", b"fetchTimeMs: 100\r\n", "application/warc-fields", number))


def read_ours(path: Path) -> tuple[int, int, str]:
    """Return (pages, bytes, digest of their last bytes) by our reader."""
    count, size, digest = 0, 0, hashlib.sha256()
    for found in read_part(Part("c", str(path), path.name, "warc", ".gz"), ReadSettings(max_document_bytes=1 << 30)):
        if isinstance(found, Document):
            count, size = count + 1, size + len(found.raw)
            digest.update(found.raw[-64:] + found.url.encode() + found.charset.encode())
    return count, size, digest.hexdigest()


def read_by_warcio(path: Path) -> tuple[int, int, str]:
    """Return the same by warcio."""
    count, size, digest = 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        for record in ArchiveIterator(file):
            if record.rec_type == "response":
                content_type, _, charset = record.http_headers.get_header("Content-Type").partition("; charset=")
                if content_type == "text/html":
                    body = record.content_stream().read()
                    count, size = count + 1, size + len(body)
                    digest.update(
                        body[-64:] + record.rec_headers.get_header("WARC-Target-URI").encode() + charset.encode()
                    )
    return count, size, digest.hexdigest()


def measure(path: Path, rounds: int) -> tuple[dict[str, float], int, int]:
    """Return the CPU-seconds of each reader, and the number and bytes of the pages."""
    readers: dict[str, Read] = {"warcio": read_by_warcio, "trimaran": read_ours}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    found: tuple[int, int, str] | None = None
    for number in range(rounds + 1):  # the first, which fills the caches, does not count
        for name, read in readers.items():
            begin = time.process_time()
            result = read(path)
            seconds[name] += [time.process_time() - begin] if number else []
            found = found or result
            assert result == found, "both read the same"
    assert found is not None
    return {name: statistics.median(times) for name, times in seconds.items()}, found[0], found[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pages.warc.gz"
        make_archive(path, options.pages, options.seed)
        seconds, pages, size = measure(path, options.rounds)
        print(f"{pages} pages, {size / 1e6:.1f} MB, packed {path.stat().st_size / 1e6:.1f} MB; Python", end=" ")
        print(f"{platform.python_version()}\n\n| reader | CPU-seconds | MB/s | ratio |\n|---|---:|---:|---:|")
        for name, spent in seconds.items():
            print(f"| {name} | {spent:.3f} | {size / 1e6 / spent:.0f} | {seconds['warcio'] / spent:.2f} |")


if __name__ == "__main__":
    main()
