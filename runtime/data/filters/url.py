"""A list of domains, addresses and words of URLs whose pages are removed."""

import re
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import numpy as np

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.files import open_regular

_MOST_LINE_BYTES: Final = 1 << 16
_MOST_FOLDERS: Final = 8
_NO_WORD = re.compile(r"[\W_]+")
_WORD = re.compile(r"[^\W_]+")
_DOMAIN = re.compile(r"(?:[\w-]+\.)+[\w-]+|[\da-f:.]*:[\da-f:.]+")
_HOSTS_FILE = re.compile(r"(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+")


class UrlFilter:
    """Removes documents whose URL is on a list.

    A file has one entry a line. `example.org` stands for the domain and its subdomains, `example.org/news` for an
    address and what is below it, and `casino` for a word, which is whole between anything but letters and digits. A
    line of a hosts file (0.0.0.0 example.org) is taken as its domain; # begins a comment.

    Domains and addresses are kept as sorted 64-bit hashes, 8 bytes each, so that lists of millions fit.
    """

    name = "url"

    def __init__(self, files: Sequence[str]) -> None:
        """Raises DataError for a file that can't be read or a line that is no entry."""
        self._words: set[str] = set()
        hashes = {"domain": array("Q"), "address": array("Q")}
        for file in files:
            for kind, entry in _entries(Path(file)):
                if kind == "word":
                    self._words.add(entry)
                else:
                    hashes[kind].append(_hash(entry))
        self._hashes = {kind: np.unique(np.frombuffer(each, np.uint64)) for kind, each in hashes.items() if each}

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Return the entry that the URL falls under."""
        if not document.url:
            counts["url.without_url"] += 1
            return None
        host, path = _split(document.url)
        domains = list(_domains(host))
        for kind, known in self._hashes.items():
            names = domains if kind == "domain" else [f"{domain}/{top}" for domain in domains for top in _tops(path)]
            wanted = np.array([_hash(name) for name in names], np.uint64)
            found = known.take(np.searchsorted(known, wanted), mode="clip") == wanted
            if found.any():
                return Removal(f"url.{kind}", names[int(found.argmax())])
        words = self._words.intersection(_NO_WORD.split(unquote(document.url).casefold()))
        return Removal("url.word", min(words)) if words else None


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every entry of a file with its kind: word, domain or address."""
    number = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(_MOST_LINE_BYTES):
                number += 1
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").partition("#")[0].strip()
                if text := _HOSTS_FILE.sub("", text):
                    yield _entry(text, f"{path}, line {number}")
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number} is not UTF-8; filter.url_blocklist takes text files") from None
    except OSError as error:
        raise unreadable(path, error, "take it out of data.filter.url_blocklist") from error


def _entry(text: str, place: str) -> tuple[str, str]:
    if _WORD.fullmatch(text):
        return "word", text.casefold()
    host, path = _split(text)
    if not _DOMAIN.fullmatch(host) or path.count("/") >= _MOST_FOLDERS:
        fix = "write a domain, an address or a word of letters and digits on each line"
        raise DataError(f"{place}: {text[:60]!r} is no entry of a URL block list; {fix}")
    return ("address", f"{host}/{path}") if path else ("domain", host)


def _split(url: str) -> tuple[str, str]:
    """Return the host of a URL as DNS knows it, and the path without slashes at its ends; both empty if it has none."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = parts.hostname or ""
    except ValueError:  # [ without ]
        return "", ""
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:  # a label that is empty or too long
            host = host.casefold()
    return host.rstrip("."), parts.path.strip("/")


def _domains(host: str) -> Iterator[str]:
    """Yield a host and the domains that it is in, the shortest last."""
    while host:
        yield host
        host = host.partition(".")[2]


def _tops(path: str) -> list[str]:
    """Return a path cut after its first folder, its second and so on."""
    folders = path.split("/")
    return ["/".join(folders[:depth]) for depth in range(1, min(len(folders), _MOST_FOLDERS) + 1)]


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
