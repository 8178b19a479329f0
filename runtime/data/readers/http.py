"""An HTTP response as an archive keeps it: its status and headers, and its body without its encodings."""

import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Final, NamedTuple

from trimaran.runtime.data.extras import require_extra

_USUAL_HEAD = 2048
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)
_CHUNK = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")


class Headers:
    """The headers of a record or a response."""

    def __init__(self, head: bytes) -> None:
        self._head, self._lower = head, head.lower()

    def get(self, name: bytes) -> str:
        """Return the header of a name in lower case, "" where it is missing."""
        key = b"\n" + name + b":"
        begin = self._lower.find(key)
        if begin < 0:
            return ""
        end = self._lower.find(b"\n", begin + 1)
        return self._head[begin + len(key) : end if end >= 0 else None].strip().decode("utf-8", "replace")


class Response(NamedTuple):
    """Status code, 0 where there is none; media type; charset; encodings as they were made; the body as it was sent."""

    status: int
    media_type: str
    charset: str
    encodings: tuple[str, ...]
    body: bytes


class EncodingError(ValueError):
    """A body that can't be decoded."""


class TooLargeError(ValueError):
    """A body that has, or is decoded to, more bytes than allowed."""


@lru_cache(maxsize=1024)
def media_type_of(header: str) -> tuple[str, str]:
    """Return (media type, charset) of a Content-Type header, each "" where it says nothing."""
    found = _CHARSET.search(header)
    return header.partition(";")[0].strip().lower(), found[1] if found else ""


def parse_response(block: memoryview) -> Response | None:
    """Return the response that a record's block is, None where it is none."""
    if bytes(block[:5]) != b"HTTP/":
        return None
    head = bytes(block[:_USUAL_HEAD])
    end, length = head.find(b"\r\n\r\n"), 4
    if end < 0 or head.find(b"\n\n", 0, end) >= 0:  # lines that end in \n alone
        found = _HEAD_END.search(block)
        end, length = (found.start(), found.end() - found.start()) if found else (len(block), 0)
        head = bytes(block[:end])
    body = bytes(block[end + length :])
    head = head[:end]
    words = head[:64].split(None, 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    headers = Headers(head)
    encodings = _names(headers.get(b"content-encoding")) + _names(headers.get(b"transfer-encoding"))
    return Response(status, *media_type_of(headers.get(b"content-type")), encodings, body)


def _names(header: str) -> tuple[str, ...]:
    if not header:
        return ()
    names = (name.strip().lower().removeprefix("x-") for name in header.split(","))
    return tuple(name for name in names if name not in ("", "identity", "none"))


def decode_body(response: Response, most_bytes: int, cut: bool) -> bytes:
    """Return the body without its encodings.

    Many archives keep a body that is decoded already beside the headers of the encoded one, so text that can't be
    decoded from its first byte on is taken as it is.

    Args:
        most_bytes: the most that it may be decoded to.
        cut: the archive says that it holds the begin of the body only; what that decodes to is returned.

    Raises:
        EncodingError: it can't be decoded.
        TooLargeError: it has more bytes.
    """
    body = response.body
    for name in reversed(response.encodings):
        try:
            body = _DECODE[name](body, most_bytes, cut) if name in _DECODE else _unknown(name)
        except Exception as error:
            if isinstance(error, TooLargeError) or not isinstance(error, (EncodingError, *_errors())):
                raise
            if _CONTROL.search(body[:1024]) or (name == "chunked" and _CHUNK.match(body)):
                raise EncodingError(f"{name}: {error}") from error
    if len(body) > most_bytes:
        raise TooLargeError(f"more than {most_bytes:,} bytes")
    return body


def is_html(body: bytes) -> bool:
    """Return whether a body without a known type begins as a page does."""
    return body.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower().startswith((b"<!doctype html", b"<html"))


def _unknown(name: str) -> bytes:
    raise EncodingError("an unknown encoding")


def _chunked(body: bytes, most_bytes: int, cut: bool) -> bytes:
    pieces, at = [], 0
    while size := _CHUNK.match(body, at):
        length = int(size[1], 16)
        pieces.append(body[size.end() : size.end() + length])
        if not length:
            return b"".join(pieces)
        at = size.end() + length
        at += 2 if body.startswith(b"\r\n", at) else 1
    if not cut:
        raise EncodingError(f"no chunk begins at byte {min(at, len(body)):,} of {len(body):,}")
    return b"".join(pieces)


def _inflate(bits: int, body: bytes, most_bytes: int, cut: bool) -> bytes:
    """Decode zlib's format (bits 15), gzip's (31, of several members too) or bare deflate (-15)."""
    pieces, size = [], 0
    while body:
        stream = zlib.decompressobj(bits)
        pieces.append(stream.decompress(body, most_bytes + 1 - size))
        size += len(pieces[-1])
        if size > most_bytes:
            raise TooLargeError(f"more than {most_bytes:,} bytes when decoded")
        if not stream.eof and not cut:
            raise EncodingError("it ends early")
        body = stream.unused_data if stream.unused_data.startswith(b"\x1f\x8b") else b""
    return b"".join(pieces)


def _deflate(body: bytes, most_bytes: int, cut: bool) -> bytes:
    """Decode zlib's format, or the bare one that many servers send under its name."""
    try:
        return _inflate(15, body, most_bytes, cut)
    except zlib.error:
        return _inflate(-15, body, most_bytes, cut)


def _brotli(body: bytes, most_bytes: int, cut: bool) -> bytes:
    require_extra("brotli")
    import brotli

    stream = brotli.Decompressor()
    pieces = [stream.process(body, output_buffer_limit=most_bytes + 1)]
    while not stream.can_accept_more_data() and not stream.is_finished() and sum(map(len, pieces)) <= most_bytes:
        pieces.append(stream.process(b"", output_buffer_limit=most_bytes + 1))
    if sum(map(len, pieces)) > most_bytes:
        raise TooLargeError(f"more than {most_bytes:,} bytes when decoded")
    if not stream.is_finished() and not cut:
        raise EncodingError("it ends early")
    return b"".join(pieces)


def _zstd(body: bytes, most_bytes: int, cut: bool) -> bytes:
    require_extra("zstandard")
    import zstandard

    decoded = zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True).read(most_bytes + 1)
    if len(decoded) > most_bytes:
        raise TooLargeError(f"more than {most_bytes:,} bytes when decoded")
    if not decoded and body:
        raise EncodingError("it ends early")
    return decoded


_DECODE: Final[Mapping[str, Callable[[bytes, int, bool], bytes]]] = {
    "chunked": _chunked,
    "gzip": partial(_inflate, 31),
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}


@cache
def _errors() -> tuple[type[Exception], ...]:
    """Return the errors of the libraries, of those that are installed."""
    return (
        zlib.error,
        *(
            getattr(import_module(package), name)
            for package, name in (("brotli", "error"), ("zstandard", "ZstdError"))
            if find_spec(package)
        ),
    )
