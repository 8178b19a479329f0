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
# What follows a block whose length is right. Longest, a blank line and the begin of a record.
_AFTER = re.compile(rb"(\r?\n){2}|(\r?\n)?(WARC/|\Z)|\r\n?\r?\Z")
_MOST_AFTER = 8
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

    def __init__(self, stream: Stream, start: int) -> None:
        self._stream = stream
        self.data = bytearray(4 * _BLOCK)
        self.at = self.end = 0
        self._base = start

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

    def take(self, size: int, more: int) -> memoryview:
        """Return the next bytes, fewer at the end; they change when more than `more` bytes beyond are asked for."""
        self.fill(size + more)
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

    def has_end(self) -> bool:
        """Return whether a block ends here: blank lines follow, a record or nothing."""
        self.fill(_MOST_AFTER)
        if self.data.startswith(b"\r\n\r\n", self.at, self.end):
            return True
        return _AFTER.match(bytes(self.data[self.at : min(self.end, self.at + _MOST_AFTER)])) is not None

    def rewind(self, place: int) -> None:
        """Go back to a place that was met; no further than can be."""
        if place < self._base and self._stream.seekable():
            self._stream.seek(place)
            self._base, self.at, self.end = place, 0, 0
        else:
            self.at = max(0, place - self._base)

    def go_on(self, begin: int) -> Damage | None:
        """Return why the bytes ended too early, in a record that begins at `begin`; pass over what is left of it."""
        damage = self._stream.go_on(begin)
        if damage is not None:
            self._base, self.at = self._base + 1, self.end
        return damage

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


def records(stream: Stream, most_bytes: int, start: int = 0, stop: int | None = None) -> Iterator[Record | Damage]:
    """Yield every record, and in the place of bytes that are none a Damage: neither fastwarc nor warcio tells of all.

    Of a record whose length is wrong nothing is yielded; it goes on at the next line that begins a record.

    Args:
        start: the place of the stream's first byte.
        stop: a place at which, or behind which, the first record begins that is not yielded.
    """
    window = _Window(stream, start)
    while True:
        window.skip_blank_lines()
        begin = window.place
        if stop is not None and begin >= stop:
            return
        if not window.left:
            if damage := window.go_on(begin):
                yield damage
                continue
            return
        headers = _headers(window)
        if headers is None:
            is_cut = window.left < _MOST_HEADER and _is_cut_head(window)
            if is_cut and (damage := window.go_on(begin)):
                yield damage
            elif is_cut:
                yield Damage("read.truncated", "the last record is cut short in its headers", begin)
                return
            else:
                window.skip_to_record()
                yield Damage("read.damaged", f"{window.place - begin:,} bytes are no record", begin)
            continue
        length, body = headers.get(b"content-length"), window.place
        size = int(length) if _LENGTH.fullmatch(length) else None
        if size is not None:
            block = window.take(size, _MOST_AFTER) if size <= most_bytes else None
            got = len(block) if block is not None else window.skip(size)
            if got == size and window.has_end():
                yield Record(begin, headers.get(b"warc-type").lower(), headers, size, block)
                continue
            if damage := window.go_on(begin) if got < size else None:
                yield damage
                continue
        window.rewind(body)
        window.skip_to_record()
        if size is None or window.left or got == size:
            yield Damage("read.damaged", f"a record that is not as long as its Content-Length, {length[:20]!r}", begin)
        else:
            detail = f"the last record is cut short: it has {got:,} of {size:,} bytes"
            yield Damage("read.truncated", detail, begin)


def _headers(window: _Window) -> Headers | None:
    """Return the headers of a record and pass over them; None, at the same place, where there are none."""
    data, at = window.data, window.at
    first = _BEGIN.match(data, at, window.end)
    if first is None:
        return None
    blank = b"\r\n\r\n" if first[0].endswith(b"\r\n") else b"\n\n"
    end = data.find(blank, first.end() - len(blank) // 2, min(at + _MOST_HEADER, window.end))
    if end < 0:
        return None
    window.at = end + len(blank)
    return Headers(bytes(data[at : end + 2]))


def _is_cut_head(window: _Window) -> bool:
    """Return whether the last bytes may be the begin of a record."""
    rest = bytes(window.data[window.at : min(window.at + _FIRST_LINE, window.end)])
    return _BEGIN.match(rest) is not None or (len(rest) < _FIRST_LINE and b"WARC/".startswith(rest[:5]))


def read_warc(part: Part, settings: ReadSettings, tally: Tally) -> Iterator[Document | Loss]:
    """Yield the page of each response or resource that has HTML, and the text of each conversion.

    Requests, metadata and the like, which are no documents, are noted as `read.TYPE`.
    """
    # The block of a response has headers too, and its body may have grown where it was encoded.
    most = 2 * settings.max_document_bytes + _MOST_HEADER
    with open_part(part) as stream:
        yield from _documents(records(stream, most, part.start, part.stop), part, settings, tally)


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
