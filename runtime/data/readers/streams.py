"""From a file, local or remote, packed or not, to its bytes and lines. Memory stays bounded whatever the file holds."""

import codecs
import errno
import io
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

from trimaran.runtime.data.corpus import MARKS
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.part import Damage, Part
from trimaran.runtime.data.readers.unpack import unpack, without_first
from trimaran.runtime.files import open_regular

T = TypeVar("T")

_BLOCK = 1 << 18
# Of a remote file, fetched at once; s3fs alone would take 50 MiB.
_FETCH_BYTES = 8 << 20
# A table has to be unpacked to disk before it can be read.
_MOST_UNPACKED = 64 << 30
_PACKAGE_OF: Final = {"s3": "s3fs", "s3a": "s3fs"}


def is_remote(file: str) -> bool:
    """Return whether a file or source is an address such as s3://bucket/key, and no path."""
    return "://" in file


def file_system(address: str) -> tuple[Any, str]:
    """Return (fsspec's file system, path in it) of an address; DataError where it has no driver here."""
    require_extra("fsspec")
    import fsspec

    scheme = address.partition("://")[0]
    if scheme in _PACKAGE_OF:
        require_extra(_PACKAGE_OF[scheme], extra="s3")
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: {error}; install its driver, or copy the files to a disk") from None


def asking(address: str, call: Callable[[], T]) -> T:
    """Return what a call to a file system returns. What goes wrong is an OSError with a number; it names the file."""
    try:
        return call()
    except Exception as error:
        number = getattr(error, "errno", None) or (errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO)
        what = os.strerror(number) if number == errno.ENOENT else f"{type(error).__name__}: {error}"
        raise OSError(number, what, address) from error


class _Remote(io.RawIOBase):
    """A remote file."""

    def __init__(self, address: str) -> None:
        system, path = file_system(address)
        self._address = address
        self._file = asking(address, lambda: system.open(path, "rb", block_size=_FETCH_BYTES))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return cast(int, asking(self._address, lambda: self._file.seek(offset, whence)))

    def tell(self) -> int:
        return cast(int, self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = asking(self._address, lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _From(io.RawIOBase):
    """A file without its first bytes."""

    def __init__(self, file: io.BufferedReader, start: int) -> None:
        self._file, self._start = file, start
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (self._start if whence == 0 else 0), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Blocks(io.RawIOBase):
    """Bytes that come in blocks. Where some can't be made they end; `damage` says why, and `go_on` has others come."""

    def __init__(self, blocks: Iterator[bytes | Damage], source: io.IOBase) -> None:
        self._blocks, self._source, self._left = blocks, source, memoryview(b"")
        self.damage: Damage | None = None

    def readable(self) -> bool:
        return True

    def block(self) -> bytes:
        """Return the next block, b"" at the end."""
        found = b"" if self.damage else next(self._blocks, b"")
        if not isinstance(found, Damage):
            return found
        self.damage = found
        return b""

    def go_on(self) -> None:
        """Have the bytes after the damage come."""
        self.damage = None

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(self.block())
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


class Stream(io.BufferedReader):
    """The bytes of a file, without its compression."""

    @property
    def damage(self) -> Damage | None:
        """Why the bytes that were read to their end are not all of them."""
        return getattr(self.raw, "damage", None)

    def block(self) -> bytes:
        """Return the next bytes, as many as come at once and are not copied for it; for who reads by nothing else."""
        return self.raw.block() if isinstance(self.raw, _Blocks) else self.read1(_BLOCK)

    def check(self, at: int) -> None:
        """Raise Damage at `at`, where the reader was, if the bytes ended too early."""
        if self.damage is not None:
            raise Damage(self.damage.reason, self.damage.detail, at)

    def go_on(self, at: int) -> Damage | None:
        """Return why the bytes ended too early, and have those after the damage come; None where they did not.

        Args:
            at: where the reader was. What was lost there counts as one byte, so that no other place is the same.
        """
        damage = self.damage
        if damage is None:
            return None
        assert isinstance(self.raw, _Blocks | _Recoded)
        self.raw.go_on()
        return Damage(damage.reason, damage.detail, at)


def stamp_of(status: os.stat_result | Mapping[str, Any]) -> str:
    """Return what differs between two versions of a file, of what its file system says of it."""
    if isinstance(status, os.stat_result):
        return f"{status.st_size}-{status.st_mtime_ns}"
    known = (status.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    value: Any = next(filter(None, known), "")
    # A listing may have seconds where the same file system's `info` has a date.
    return f"{status['size']}-{value.timestamp() if isinstance(value, datetime) else value}".replace('"', "")


def open_raw(part: Part) -> io.BufferedReader:
    """Open the file of a part as it is; OSError where it can't be, or has changed since the part was made of it."""
    if is_remote(part.file):
        system, path = file_system(part.file)
        file: io.BufferedReader = Stream(_Remote(part.file), _BLOCK)
        system.invalidate_cache(posixpath.dirname(path))  # of listings, which this process may have made long ago
        stamp = stamp_of(asking(part.file, lambda: system.info(path))) if part.stamp else ""
    else:
        file = open_regular(Path(part.file))
        stamp = stamp_of(os.fstat(file.fileno()))
    if part.stamp not in ("", stamp):
        file.close()
        raise OSError(errno.ESTALE, "it has changed since its work was laid out; run the command again", part.file)
    return file


def open_part(part: Part) -> Stream:
    """Open the file of a part and unpack it as it is read; of a slice, from its `start` on."""
    file = open_raw(part)
    if part.member:
        file = io.BufferedReader(_From(file, part.member))
    if not part.compression:
        return Stream(file.detach(), _BLOCK)
    blocks = unpack(file, part.compression)
    if part.is_slice:
        blocks = without_first(blocks, part.start - part.member_place)
    return Stream(_Blocks(blocks, file), _BLOCK)


def stream_of(blocks: Iterator[bytes | Damage]) -> Stream:
    """Return a stream of bytes that come in blocks."""
    return Stream(_Blocks(blocks, io.BytesIO()), _BLOCK)


def open_table(part: Part) -> BinaryIO:
    """Open a file that is read in places, not from its begin to its end; a packed one is unpacked on disk.

    The unpacked file has no name, so it is gone when it is closed. Raises Damage where the file can't be unpacked.
    """
    if not part.compression:
        return open_raw(part)
    spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    try:
        with open_part(part) as packed:
            while block := packed.read(1 << 20):
                if spool.tell() > _MOST_UNPACKED:
                    raise Damage("read.too_large", f"more than {_MOST_UNPACKED >> 30} GiB when unpacked", 0)
                spool.write(block)
            packed.check(0)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool


class _Recoded(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8; what is damaged becomes U+FFFD."""

    def __init__(self, stream: Stream, encoding: str) -> None:
        self._stream, self._left = stream, b""
        self._decode = codecs.getincrementaldecoder(encoding)("replace").decode

    @property
    def damage(self) -> Damage | None:
        return self._stream.damage

    def go_on(self) -> None:
        """Have the bytes after the damage come."""
        self._stream.go_on(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._stream.read(1 << 16)
            self._left = self._decode(data, not data).encode("utf-8", "replace")
            if not data:
                break
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def utf16_mark(start: bytes) -> str:
    """Return the encoding that the first bytes of a file name, "" for UTF-8."""
    return next((name for mark, name in MARKS if start.startswith(mark)), "")


def as_utf8(stream: Stream) -> Stream:
    """Return a stream of text as UTF-8: itself, unless a byte order mark says that it is UTF-16 or UTF-32."""
    encoding = utf16_mark(stream.peek(4)[:4])
    return Stream(_Recoded(stream, encoding), _BLOCK) if encoding else stream


def lines(
    stream: Stream, most_bytes: int, start: int = 0, stop: int | None = None, *, is_there: bool = False
) -> Iterator[tuple[int, bytes | None] | Damage]:
    """Yield (offset, line) of every line that begins in [start, stop), None for one of more bytes, which isn't held.

    In the place of bytes that are lost, and of the line that they end, a Damage is yielded; the next line may have
    begun in them.

    Args:
        is_there: whether the stream is at `start`, where a line begins; else it is at its begin, and can be moved.
    """
    at = start
    if start and not is_there:  # the line that the byte before belongs to is another part's
        at = start - 1
        stream.seek(at)
        at += _skip_line(stream, stop - at if stop is not None else None)
    while stop is None or at < stop:
        line = stream.readline(most_bytes + 1)
        begin, at = at, at + len(line)
        if line.endswith(b"\n"):
            yield begin, line
        elif len(line) > most_bytes:
            yield begin, None
            at += _skip_line(stream, None if stop is None else max(0, stop - at))
        elif damage := stream.go_on(begin):
            yield damage
            at += 1
        else:
            if line:
                yield begin, line
            return


def _skip_line(stream: Stream, most_bytes: int | None) -> int:
    """Read to the end of a line, or at least `most_bytes`; return the number of bytes."""
    skipped = 0
    while most_bytes is None or skipped < most_bytes:
        piece = stream.readline(1 << 20)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return skipped
