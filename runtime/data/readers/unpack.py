"""Unpacks .gz, .bz2, .xz and .zst. After damage it goes on at the next member of the file, where it has several.

A member is what one call of gzip, bzip2, xz or zstd writes; archives have one for each record.
"""

import bz2
import lzma
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NamedTuple

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.readers.part import Damage

_BLOCK = 1 << 18
# Of fastwarc's reader: what is larger is mapped anew for each block, which takes a tenth of the time.
_ZSTD_BLOCK = 1 << 16
# zstandard makes all of its input at once: what packs best, a byte repeated, grows to 32 MiB.
_PACKED_BLOCK = 1 << 10
# Of a damaged member the check sum tells, which stands at its end: so many bytes wait for that, most pages whole.
_HELD_BYTES = 1 << 20
# Of what may be a member, unpacked to see whether it is one.
_TRIED_BYTES = 64 << 10
_HEAD_BYTES = 10


class _Kind(NamedTuple):
    """A compression.

    Args:
        begin: makes a decompressor of one member.
        error: what it raises for bytes that it can't unpack.
        head: how a member begins, at most _HEAD_BYTES. Its groups are the same in all members of one writer.
        reader: yields what a whole file holds in half the time or less; raises at the first damage.
    """

    begin: Callable[[], Any]
    error: type[Exception]
    head: re.Pattern[bytes]
    reader: Callable[[BinaryIO], Iterator[bytes]] | None = None


class Member(NamedTuple):
    """A member begins: at which byte of the packed file."""

    at: int


class _Held:
    """The last pieces of a member, until it is known to be whole."""

    def __init__(self) -> None:
        self._pieces, self._size = deque[bytes](), 0

    def add(self, piece: bytes) -> Iterator[bytes]:
        """Yield the pieces that don't have to wait any more."""
        self._pieces.append(piece)
        self._size += len(piece)
        while self._size - len(self._pieces[0]) >= _HELD_BYTES:
            self._size -= len(self._pieces[0])
            yield self._pieces.popleft()

    def release(self) -> Iterator[bytes]:
        """Yield the others."""
        yield from self._pieces


def unpack(file: BinaryIO, suffix: str) -> Iterator[bytes | Damage]:
    """Yield what the members of a packed file hold, and in the place of those that can't be unpacked a Damage.

    Of a damaged member, all but its last MiB is yielded before the Damage, as it was found too late; of one that is cut
    short at the end of the file, all that there is.

    Args:
        suffix: of the compression, such as .gz.
    """
    kind = _KINDS[suffix]()
    return _contents(_unpack(file, kind)) if kind.reader is None else _unpack_fast(file, kind, kind.reader)


def unpack_members(file: BinaryIO, suffix: str) -> Iterator[bytes | Damage | Member]:
    """Yield the same as `unpack`, and before what a member holds where it begins."""
    return _unpack(file, _KINDS[suffix](), with_members=True)


def _unpack_fast(file: BinaryIO, kind: _Kind, read: Callable[[BinaryIO], Iterator[bytes]]) -> Iterator[bytes | Damage]:
    held, given = _Held(), 0
    try:
        for block in read(file):
            for piece in held.add(block):
                given += len(piece)
                yield piece
    except (kind.error, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the file's own
            raise
        yield from without_first(_contents(_unpack(file, kind)), given)
        return
    yield from held.release()


def without_first(found: Iterator[bytes | Damage], count: int) -> Iterator[bytes | Damage]:
    """Yield what is found without its first `count` bytes, all of which come before the first Damage."""
    for each in found:
        if isinstance(each, Damage):
            count = 0
            yield each
            continue
        if len(each) > count:
            yield each[count:]
        count = max(0, count - len(each))


def _contents(found: Iterator[bytes | Damage | Member]) -> Iterator[bytes | Damage]:
    return (each for each in found if not isinstance(each, Member))


def _unpack(
    file: BinaryIO, kind: _Kind, start: int = 0, with_members: bool = False
) -> Iterator[bytes | Damage | Member]:
    known = set[tuple[bytes, ...]]()
    at = _skip_padding(file, start)
    while at is not None:
        stream, held, begin, why = kind.begin(), _Held(), at, ""
        head = kind.head.match(_read(file, begin, _HEAD_BYTES))
        file.seek(begin)
        if with_members:
            yield Member(begin)
        try:
            while not stream.eof and (data := file.read(_PACKED_BLOCK)):
                for piece in filter(None, _pieces(stream, data)):
                    yield from held.add(piece)
        except kind.error as error:
            if getattr(error, "errno", None) is not None:  # of the file's own
                raise
            why = str(error)
        if stream.eof and not why:
            yield from held.release()
            known |= {head.groups()} if head else set()
            at = _skip_padding(file, file.tell() - len(stream.unused_data))
            continue
        at = _next_member(file, begin + 1, kind, known)
        if at is not None:
            yield Damage("read.damaged", f"packed bytes {begin:,} to {at:,} can't be unpacked{why and f': {why}'}")
        elif why:
            yield Damage("read.damaged", f"nothing from packed byte {begin:,} on can be unpacked: {why}")
        else:
            yield from held.release()
            yield Damage("read.truncated", f"the file ends early, at byte {file.seek(0, os.SEEK_END):,}")


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _skip_padding(file: BinaryIO, at: int) -> int | None:
    """Return the place of the next byte that isn't 0, None at the end of the file."""
    while data := _read(file, at, _PACKED_BLOCK):
        if rest := data.lstrip(b"\0"):
            return at + len(data) - len(rest)
        at += len(data)
    return None


def _next_member(file: BinaryIO, at: int, kind: _Kind, known: set[tuple[bytes, ...]]) -> int | None:
    """Return the place of the next member, from `at` on: it begins as others of the file, or can be unpacked."""
    while True:
        window = _read(file, at, _BLOCK)
        found = kind.head.search(window)
        while found:
            if found.groups() in known or _can_unpack(file, kind, at + found.start()):
                return at + found.start()
            found = kind.head.search(window, found.start() + 1)
        if len(window) < _BLOCK:
            return None
        at += len(window) - _HEAD_BYTES


def _can_unpack(file: BinaryIO, kind: _Kind, at: int) -> bool:
    stream, end = kind.begin(), at + _TRIED_BYTES
    try:
        while not stream.eof and at < end and (data := _read(file, at, _PACKED_BLOCK)):
            at += len(data)
            for _ in _pieces(stream, data):
                pass
    except kind.error as error:
        if getattr(error, "errno", None) is not None:
            raise
        return False
    return True


def _pieces(stream: Any, data: bytes) -> Iterator[bytes]:
    """Yield what a decompressor makes of its next input, in pieces of bounded size."""
    if isinstance(stream, bz2.BZ2Decompressor | lzma.LZMADecompressor):
        yield stream.decompress(data, _BLOCK)
        while not stream.eof and not stream.needs_input:
            yield stream.decompress(b"", _BLOCK)
    elif isinstance(stream, type(zlib.decompressobj())):
        piece = b""
        while data or len(piece) == _BLOCK:
            yield (piece := stream.decompress(data, _BLOCK))
            data = stream.unconsumed_tail
    else:
        yield stream.decompress(data)


def _gzip() -> _Kind:
    require_extra("isal")
    # Between the groups stands a time, which may be another in each member.
    head = re.compile(rb"(\x1f\x8b\x08[\0-\x1f])....(..)", re.DOTALL)
    return _Kind(lambda: zlib.decompressobj(31), zlib.error, head, _read_gzip)


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    from isal import igzip, isal_zlib

    reader = igzip.IGzipFile(fileobj=file, mode="rb")
    try:
        while block := reader.read1(_BLOCK):
            yield block
    except isal_zlib.error as error:  # type: ignore[misc]  # its stub declares an instance of Exception
        raise zlib.error(str(error)) from error


def _zstd() -> _Kind:
    require_extra("fastwarc", "zstandard")
    import zstandard

    head = re.compile(rb"(\x28\xb5\x2f\xfd.)", re.DOTALL)
    return _Kind(lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, head, _read_zstd)


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    from fastwarc.stream_io import ZstdReader

    reader = ZstdReader(file)
    before: int | None = -1
    # A member without content reads as the end, so the end is what reads as one twice at the same member.
    while (block := reader.read(_ZSTD_BLOCK)) or reader.frame_start_position() != before:
        before = -1 if block else reader.frame_start_position()
        if block:
            yield block


_KINDS: Final[Mapping[str, Callable[[], _Kind]]] = MappingProxyType(
    {
        ".gz": _gzip,
        ".bz2": lambda: _Kind(bz2.BZ2Decompressor, OSError, re.compile(rb"(BZh)[1-9]1AY&SY")),
        ".xz": lambda: _Kind(lzma.LZMADecompressor, lzma.LZMAError, re.compile(rb"(\xfd7zXZ\0)")),
        ".zst": _zstd,
    }
)
COMPRESSED: Final = tuple(_KINDS)
"""Suffixes of files that are unpacked."""
