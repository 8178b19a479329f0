"""A packed file of several members in slices, each of which one task reads: lines or records of a range of it.

The ids of documents are places in the unpacked file, and a file says nowhere how long its members are when unpacked. So
it is unpacked once, which takes a small part of what cleaning takes. Members need not begin with a line or record, as
those of bgzip, pzstd and pbzip2 do not: a slice begins with the first that does, and ends within a member.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final, NamedTuple

from trimaran.runtime.data.readers.part import Damage, Part
from trimaran.runtime.data.readers.streams import is_remote, open_raw, stream_of, utf16_mark
from trimaran.runtime.data.readers.unpack import Member, unpack_members
from trimaran.runtime.data.readers.warc import records

_FORMATS: Final = ("jsonl", "lines", "warc", "wet")
# Not .bz2: unpacking it takes as long as cleaning what it holds, so that to find slices would cost what they save.
_COMPRESSIONS: Final = (".gz", ".xz", ".zst")
LEAST_SLICED: Final = 4 << 20
"""Bytes of a packed file below which it is one task: text is packed to a quarter or less."""


def may_have_slices(part: Part) -> bool:
    """Return whether slices of a file are worth looking for; a remote one would be fetched twice."""
    large = part.compression in _COMPRESSIONS and part.file_bytes >= LEAST_SLICED
    return large and part.format in _FORMATS and not is_remote(part.file)


class Slice(NamedTuple):
    """A range of a packed file: see `Part`; `stop` is None at the end of the file."""

    start: int
    stop: int | None
    member: int
    member_place: int


class _Begin(NamedTuple):
    """The first line or record that begins in a member or behind it."""

    start: int
    member: int
    member_place: int


def slice_of(part: Part, found: Slice, slice_bytes: int) -> Part:
    """Return a slice of a packed file as a part; its bytes are about those of its text."""
    size = slice_bytes if found.stop is None else found.stop - found.start
    return replace(part, **found._asdict(), part_bytes=size)


def find_slices(part: Part, slice_bytes: int) -> list[Slice]:
    """Return slices of about so many unpacked bytes; [] for a file that has to be read in one piece.

    Such are files of one member, text in UTF-16, and damaged files, whose reader tells where.

    Raises:
        OSError: the file can't be reached, or has changed since the part was made.
    """
    chosen = [_Begin(0, 0, 0)]
    with open_raw(part) as file:
        found = unpack_members(file, part.compression)
        begins = _of_records(found) if part.format in ("warc", "wet") else _of_lines(found)
        try:
            for begin in begins:
                if begin.start - chosen[-1].start >= slice_bytes:
                    chosen.append(begin)
        except Damage:
            return []
    stops = [begin.start for begin in chosen[1:]]
    slices = [Slice(begin.start, stop, *begin[1:]) for begin, stop in zip(chosen, [*stops, None], strict=True)]
    return slices if len(slices) > 1 else []


def _of_lines(found: Iterable[bytes | Damage | Member]) -> Iterator[_Begin]:
    place, last, waiting = 0, b"\n", list[tuple[int, int]]()
    for each in found:
        if isinstance(each, Damage):
            raise each
        if isinstance(each, Member):
            waiting = [(each.at, place)]
            if last == b"\n":
                yield _Begin(place, *waiting.pop())
        elif each:
            if place == 0 and utf16_mark(each[:4]):
                raise Damage("read.wrong_charset", "lines of UTF-16 end by other bytes")
            if waiting and (line := each.find(b"\n") + 1):
                yield _Begin(place + line, *waiting.pop())
            place += len(each)
            last = each[-1:]


def _of_records(found: Iterable[bytes | Damage | Member]) -> Iterator[_Begin]:
    members, place = deque[tuple[int, int]](), 0

    def contents() -> Iterator[bytes | Damage]:
        nonlocal place
        for each in found:
            if isinstance(each, Member):
                members.append((each.at, place))
            else:
                place += 0 if isinstance(each, Damage) else len(each)
                yield each

    with stream_of(contents()) as stream:
        for record in records(stream, 0):
            if isinstance(record, Damage):
                raise record
            last = None
            while members and members[0][1] <= record.at:
                last = members.popleft()
            if last is not None:
                yield _Begin(record.at, *last)
