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
_BEGIN = re.compile(rb"WARC/\d\.\d[ \t]*\r?\n")
_NEXT = re.compile(rb"\nWARC/\d\.\d[ \t]*\r?\n")


class Record(NamedTuple):
    """A record: where it begins in the unpacked file, type, headers, size, and block: None if too large to be held."""

    at: int
    type: str
    headers: Headers
    size: int
    block: bytes | None


class _Window:
    """The bytes of a stream that are looked at: those of `data` from `at` on."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.data, self.at, self._base = b"", 0, 0

    @property
    def place(self) -> int:
        return self._base + self.at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def fill(self, size: int) -> bool:
        """Have `size` bytes in `data` from `at` on; return whether there are that many."""
        left = len(self.data) - self.at
        if left >= size:
            return True
        pieces = [self.data[self.at :]]
        while left < size and (piece := self._stream.block()):
            pieces.append(piece)
            left += len(piece)
        self._base, self.data, self.at = self.place, b"".join(pieces), 0
        return left >= size

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        self.fill(size)
        taken = self.data[self.at : self.at + size]
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
            if self.data.startswith(b"\r\n\r\n", self.at):
                self.at += 4
            if self.data[self.at : self.at + 1] not in (b"\r", b"\n"):
                return
            self.at += 1

    def skip_to_record(self) -> None:
        """Pass over what is no record, to the next line that begins one, or to the end."""
        while self.fill(_MOST_HEADER) or self.left:
            if found := _NEXT.search(self.data, self.at):
                self.at = found.start() + 1
                return
            self.at = max(self.at + 1, len(self.data) - 32) if self.left > 64 else len(self.data)


def records(stream: Stream, most_bytes: int) -> Iterator[Record | Damage]:
    """Yield every record, and in the place of bytes that are none a Damage.

    Raises Damage where the last record is cut short. Lengths are compared here: neither fastwarc nor warcio does that.
    """
    window = _Window(stream)
    while True:
        window.skip_blank_lines()
        begin, data, at = window.place, window.data, window.at
        if not window.left:
            stream.check(begin)
            return
        first = _BEGIN.match(data, at)
        blank = b"\r\n\r\n" if first and first[0].endswith(b"\r\n") else b"\n\n"
        end = data.find(blank, first.end() - len(blank) // 2, at + _MOST_HEADER) if first else -1
        if end < 0:
            is_cut = first or (window.left < _FIRST_LINE and b"WARC/".startswith(data[at : at + 5]))
            if window.left < _MOST_HEADER and is_cut:
                stream.check(begin)
                raise Damage("read.truncated", "the last record is cut short in its headers", begin)
            window.skip_to_record()
            yield Damage("read.damaged", f"{window.place - begin:,} bytes are no record", begin)
            continue
        headers = Headers(data[at : end + 2])
        length = headers[b"content-length"]
        window.at = end + len(blank)
        if not re.fullmatch(r"[0-9]{1,18}", length):
            window.skip_to_record()
            yield Damage("read.damaged", f"a record whose Content-Length is {length[:20]!r}", begin)
            continue
        size = int(length)
        block = window.take(size) if size <= most_bytes else None
        got = len(block) if block is not None else window.skip(size)
        if got < size:
            stream.check(begin)
            raise Damage("read.truncated", f"the last record is cut short: it has {got:,} of {size:,} bytes", begin)
        yield Record(begin, headers[b"warc-type"].lower(), headers, size, block)


def read_warc(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the page of each response or resource that has HTML, and the text of each conversion.

    Requests, metadata and the like, which are no documents, are noted as `read.TYPE`.
    """
    # The block of a response has headers too, and its body may have grown where it was encoded.
    most = 2 * settings.max_document_bytes + _MOST_HEADER
    with open_part(part) as stream:
        for record in records(stream, most):
            if isinstance(record, Damage):
                yield Loss(part.place(record.at or 0), record.reason, record.detail)
                continue
            place, kind = part.place(record.at), record.type
            if kind not in ("response", "resource", "conversion"):
                tally.note(f"read.{kind if kind.isidentifier() else 'unknown'}_record", place)
            elif record.headers[b"warc-segment-number"]:
                yield Loss(place, "read.segmented", "a record in several pieces")
            elif record.block is None:
                yield Loss(place, "read.too_large", f"a record of {record.size:,} bytes")
            elif kind == "conversion":
                text = decode(record.block, part, place, tally)
                url = record.headers[b"warc-target-uri"]
                yield text if isinstance(text, Loss) else Document(place, text, url=url, corpus=part.corpus)
            else:
                yield _page(record, record.block, part, settings, tally)


def _page(record: Record, block: bytes, part: Part, settings: ReadSettings, tally: Tally) -> Document | Loss:
    place, url = part.place(record.at), record.headers[b"warc-target-uri"].strip("<>")
    if record.type == "response":
        response = parse_response(block)
        if response is None:
            return Loss(place, "read.not_html", record.headers[b"content-type"][:100])
        if not 200 <= response.status < 300:
            return Loss(place, "read.http_error", str(response.status))
    else:
        response = Response(200, *media_type_of(record.headers[b"content-type"]), (), block)
    kind = response.media_type
    if kind in _NO_TYPE:
        kind = record.headers[b"warc-identified-payload-type"].lower()
    if kind not in (*_HTML, *_NO_TYPE):
        return Loss(place, "read.not_html", kind[:100])
    cut = bool(record.headers[b"warc-truncated"])
    try:
        body = decode_body(response, settings.max_document_bytes, cut)
    except TooLargeError as error:
        return Loss(place, "read.too_large", str(error))
    except EncodingError as error:
        return Loss(place, "read.undecodable", str(error))
    if kind in _NO_TYPE and not is_html(body):
        return Loss(place, "read.not_html", "no type, and no page by its first bytes")
    if not body.strip():
        return Loss(place, "read.empty")
    tally.note("read.cut_by_crawler", place, cut)
    return Document(place, raw=body, charset=response.charset, url=url, corpus=part.corpus)
