"""Keys of whole documents: by the address that a page was fetched from, and by its text. 128 bits each."""

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

import numpy as np

from trimaran.runtime.data.permutation import UInt64Array

VERSION: Final = 1
"""Of both normal forms; saved keys of another version are refused."""
_KEY_BYTES: Final = 16
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def url_keys(urls: Iterable[str]) -> UInt64Array:
    """Return [urls, 2], equal for addresses with the same `normalize_url`; zeros for an empty one."""
    return hash_all(normalize_url(url) for url in urls)


def text_keys(texts: Iterable[str]) -> UInt64Array:
    """Return [texts, 2], equal for texts with the same `normalize_text`; zeros for one of white space only."""
    return hash_all(normalize_text(text) for text in texts)


def hash_all(texts: Iterable[str]) -> UInt64Array:
    """Return [texts, 2], the BLAKE2b hash of each text, zeros for an empty one."""
    blank, hashes = bytes(_KEY_BYTES), bytearray()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        hashes += hashlib.blake2b(content, digest_size=_KEY_BYTES).digest() if text else blank
    return np.frombuffer(hashes, "<u8").reshape(-1, 2)


def normalize_text(text: str) -> str:
    """Return a text in normal form C and lower case, with single spaces for white space and none at its ends."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).lower().split())


def normalize_url(url: str) -> str:
    """Return what two addresses of the same page have in common, "" for an empty one.

    http is https, the host is in lower case without www. and a final dot, and the scheme's default port, the fragment
    and slashes at the end of the path are dropped. Path and query keep their case: servers tell them apart.
    """
    url = url.strip()
    if not url:
        return ""
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
        port = parts.port
    except ValueError:  # not an address: compared as it is
        return url
    place = f"{host}:{port}" if port is not None and port != _DEFAULT_PORTS.get(parts.scheme) else host
    scheme = "https" if parts.scheme == "http" else parts.scheme
    return f"{scheme}://{place}{parts.path.rstrip('/')}" + (f"?{parts.query}" if parts.query else "")
