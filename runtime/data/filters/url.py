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
_NO_WORD = re.compile(r"[\W_]+")
_WORD = re.compile(r"[^\W_]+")
_DOMAIN = re.compile(r"(?:[\w-]+\.)+[\w-]+\.?|\[[\da-fA-F:.]+]")
_HOSTS_FILE = re.compile(r"(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+")


class UrlFilter:
    """Removes documents whose URL is on a list.

    A file has one entry a line. `example.org` stands for the domain and its subdomains, `example.org/news` for an
    address and what is below it, and `casino` for a word, which is whole between anything but letters and digits. A
    line of a hosts file (0.0.0.0 example.org) is taken as its domain; # begins a comment.

    Entries are kept as sorted 64-bit hashes: 8 bytes each, so that lists of millions of domains fit.
    """

    name = "url"

    def __init__(self, files: Sequence[str]) -> None:
        """Raises DataError for a file that can't be read or a line that is no entry."""
        self._words: set[str] = set()
        hashes = array("Q")
        for file in files:
            for entry, is_word in _entries(Path(file)):
                if is_word:
                    self._words.add(entry)
                else:
                    hashes.append(_hash(entry))
        self._addresses = np.unique(np.frombuffer(hashes, np.uint64))

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Return the entry that the URL falls under."""
        if not document.url:
            counts["url.without_url"] += 1
            return None
        host, path = _split(document.url)
        for reason, names in (("domain", _domains(host)), ("address", _addresses(host, path))):
            for name in names:
                if self._has(name):
                    return Removal(f"url.{reason}", name)
        found = self._words.intersection(_NO_WORD.split(unquote(document.url).casefold()))
        return Removal("url.word", min(found)) if found else None

    def _has(self, name: str) -> bool:
        value = np.uint64(_hash(name))
        place = int(np.searchsorted(self._addresses, value))
        return place < len(self._addresses) and bool(self._addresses[place] == value)


def _entries(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every entry of a file, and whether it is a word."""
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(_MOST_LINE_BYTES):
                number += 1
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").partition("#")[0].strip()
                text = _HOSTS_FILE.sub("", text)
                if text:
                    yield _entry(text, f"{path}, line {number}")
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number} is not UTF-8; filter.url_blocklist takes text files") from None
    except OSError as error:
        raise unreadable(path, error) from error


def _entry(text: str, place: str) -> tuple[str, bool]:
    if _WORD.fullmatch(text):
        return text.casefold(), True
    host, path = _split(text)
    if not _DOMAIN.fullmatch(host):
        fix = "write a domain, an address or a word of letters and digits on each line"
        raise DataError(f"{place}: {text[:60]!r} is no entry of a URL block list; {fix}")
    return (f"{host}/{path}" if path else host), False


def _split(url: str) -> tuple[str, str]:
    """Return the host of a URL as DNS knows it, and the path without slashes at its ends."""
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


def _addresses(host: str, path: str) -> Iterator[str]:
    """Yield the addresses of a path and of the folders that it is in, on the host and on its domains."""
    folders = path.split("/") if path else []
    for domain in _domains(host):
        for depth in range(1, min(len(folders), 8) + 1):
            yield f"{domain}/{'/'.join(folders[:depth])}"


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
