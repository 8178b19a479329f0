"""Web archives: the pages of WARC's responses and resources, and the text that WET's conversions have."""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.http import (
    EncodingError,
    Headers,
    Response,
    TooLargeError,
    decode_body,
    is_html,
    media_type_of,
    parse_response,
)
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally, decode
from trimaran.runtime.data.readers.streams import Stream, open_part

_HTML: Final = ("text/html", "application/xhtml+xml")
# Types that servers send where they know none; then what the crawler found, or the first bytes, tell.
_NO_TYPE: Final = ("", "application/octet-stream", "unk", "unknown/unknown")
# Common Crawl's headers have 600 bytes.
_MOST_HEADER = 64 << 10
_BLOCK = 1 << 18
_FIRST_LINE = len(b"WARC/1.0\r\n")
_LENGTH = re.compile(r"[0-9]{1,18}")
_BEGIN = re.compile(rb"WARC/\d\.\d+[ \t]*\r?\n")
_NEXT = re.compile(rb"\nWARC/\d\.\d+[ \t]*\r?\n")


class Record(NamedTuple):
    """A record: where it begins in the unpacked file, type, headers, and size and bytes of its block.

    The block is None where it is too large to be held. It is to be used before the next record is asked for.
    """

    at: int
    kind: str
    headers: Headers
    size: int
    block: memoryview | None

    def header(self, name: bytes) -> str:
        """Return a header, "" where it is missing."""
        return self.headers.get(name)


class _Window:
    """The bytes of a stream that are looked at: `data` from `at` to `end`, in memory that is used over and over."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.data = bytearray(4 * _BLOCK)
        self.at = self.end = self._base = 0

    @property
    def place(self) -> int:
        return self._base + self.at

    @property
    def left(self) -> int:
        return self.end - self.at

    def fill(self, size: int) -> bool:
        """Have `size` bytes from `at` on; return whether there are that many."""
        if self.end - self.at >= size:
            return True
        while self.end - self.at < size and (piece := self._stream.block()):
            if self.end + len(piece) > len(self.data):
                self._make_room(max(size, self.end - self.at + len(piece)))
            self.data[self.end : self.end + len(piece)] = piece
            self.end += len(piece)
        return self.end - self.at >= size

    def _make_room(self, size: int) -> None:
        """Move the bytes to the begin, of new memory where there is not enough."""
        left = self.data[self.at : self.end]
        if size + _BLOCK > len(self.data):
            self.data = bytearray(size + 4 * _BLOCK)
        self.data[: len(left)] = left
        self._base, self.at, self.end = self.place, 0, len(left)

    def take(self, size: int) -> memoryview:
        """Return the next bytes, fewer at the end; they change when more are asked for."""
        self.fill(size)
        taken = memoryview(self.data)[self.at : min(self.at + size, self.end)]
        self.at += len(taken)
        return taken

    def skip(self, size: int) -> int:
        """Pass over bytes without holding them; return how many there were."""
        skipped = 0
        while skipped < size and self.fill(1):
            step = min(size - skipped, self.left)
            self.at += step
            skipped += step
        return skipped

    def skip_blank_lines(self) -> None:
        """Pass over the line ends between records."""
        while self.fill(_MOST_HEADER) or self.left:
            if self.data.startswith(b"\r\n\r\n", self.at, self.end):
                self.at += 4
            if not self.data.startswith((b"\r", b"\n"), self.at, self.end):
                return
            self.at += 1

    def skip_to_record(self) -> None:
        """Pass over what is no record, to the next line that begins one, or to the end."""
        while self.fill(_MOST_HEADER) or self.left:
            if found := _NEXT.search(self.data, self.at, self.end):
                self.at = found.start() + 1
                return
            self.at = self.end - 32 if self.left > 64 else self.end


def records(stream: Stream, most_bytes: int) -> Iterator[Record | Damage]:
    """Yield every record, and in the place of bytes that are none a Damage.

    Raises Damage where the last record is cut short. Lengths are compared here: neither fastwarc nor warcio does that.
    """
    window = _Window(stream)
    while True:
        window.skip_blank_lines()
        begin, data, at, left = window.place, window.data, window.at, window.left
        if not left:
            stream.check(begin)
            return
        first = _BEGIN.match(data, at, window.end)
        blank = b"\r\n\r\n" if first and first[0].endswith(b"\r\n") else b"\n\n"
        end = data.find(blank, first.end() - len(blank) // 2, min(at + _MOST_HEADER, window.end)) if first else -1
        if end < 0:
            is_cut = first or (left < _FIRST_LINE and b"WARC/".startswith(data[at : min(at + 5, window.end)]))
            if left < _MOST_HEADER and is_cut:
                stream.check(begin)
                raise Damage("read.truncated", "the last record is cut short in its headers", begin)
            window.skip_to_record()
            yield Damage("read.damaged", f"{window.place - begin:,} bytes are no record", begin)
            continue
        headers = Headers(bytes(data[at : end + 2]))
        length = headers.get(b"content-length")
        window.at = end + len(blank)
        if not _LENGTH.fullmatch(length):
            window.skip_to_record()
            yield Damage("read.damaged", f"a record whose Content-Length is {length[:20]!r}", begin)
            continue
        size = int(length)
        block = window.take(size) if size <= most_bytes else None
        got = len(block) if block is not None else window.skip(size)
        if got < size:
            stream.check(begin)
            raise Damage("read.truncated", f"the last record is cut short: it has {got:,} of {size:,} bytes", begin)
        yield Record(begin, headers.get(b"warc-type").lower(), headers, size, block)


def read_warc(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the page of each response or resource that has HTML, and the text of each conversion.

    Requests, metadata and the like, which are no documents, are noted as `read.TYPE`.
    """
    # The block of a response has headers too, and its body may have grown where it was encoded.
    most = 2 * settings.max_document_bytes + _MOST_HEADER
    with open_part(part) as stream:
        yield from _documents(records(stream, most), part, settings, tally)


def _documents(
    found: Iterator[Record | Damage], part: Part, settings: ReadSettings, tally: Tally
) -> Iterator[Document | Loss]:
    for record in found:
        if isinstance(record, Damage):
            yield Loss(part.place(record.at or 0), record.reason, record.detail)
            continue
        place, kind = part.place(record.at), record.kind
        if kind not in ("response", "resource", "conversion"):
            tally.note(f"read.{kind if kind.isidentifier() else 'unknown'}_record", place)
        elif record.header(b"warc-segment-number"):
            yield Loss(place, "read.segmented", "a record in several pieces")
        elif record.block is None:
            yield Loss(place, "read.too_large", f"a record of {record.size:,} bytes")
        elif kind == "conversion":
            text = decode(bytes(record.block), part, place, tally)
            url = record.header(b"warc-target-uri")
            yield text if isinstance(text, Loss) else Document(place, text, url=url, corpus=part.corpus)
        else:
            yield _page(record, record.block, part, settings, tally)


def _page(record: Record, block: memoryview, part: Part, settings: ReadSettings, tally: Tally) -> Document | Loss:
    place, url = part.place(record.at), record.header(b"warc-target-uri").strip("<>")
    if record.kind == "response":
        response = parse_response(block)
        if response is None:
            return Loss(place, "read.not_html", record.header(b"content-type")[:100])
        if not 200 <= response.status < 300:
            return Loss(place, "read.http_error", str(response.status))
    else:
        response = Response(200, *media_type_of(record.header(b"content-type")), (), bytes(block))
    kind = response.media_type
    if kind in _NO_TYPE:
        kind = record.header(b"warc-identified-payload-type").lower()
    if kind not in (*_HTML, *_NO_TYPE):
        return Loss(place, "read.not_html", kind[:100])
    cut = bool(record.header(b"warc-truncated"))
    try:
        body = decode_body(response, settings.max_document_bytes, cut)
    except TooLargeError as error:
        return Loss(place, "read.too_large", str(error))
    except EncodingError as error:
        return Loss(place, "read.undecodable", str(error))
    if kind in _NO_TYPE and not is_html(body):
        return Loss(place, "read.not_html", "no type, and no page by its first bytes")
    if not body or body.isspace():
        return Loss(place, "read.empty")
    tally.note("read.cut_by_crawler", place, cut)
    return Document(place, raw=body, charset=response.charset, url=url, corpus=part.corpus)
