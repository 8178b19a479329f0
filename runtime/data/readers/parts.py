"""From the sources of a corpus to its parts, each of which one task reads; what is passed over goes to the account."""

import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.document import Loss
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.arrow import split_arrow
from trimaran.runtime.data.readers.megatron import index_file, split_megatron
from trimaran.runtime.data.readers.parquet import split_parquet
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings
from trimaran.runtime.data.readers.read import READERS, read_part
from trimaran.runtime.data.readers.streams import (
    asking,
    file_system,
    is_remote,
    open_raw,
    stamp_of,
    utf16_mark,
)
from trimaran.runtime.data.readers.unpack import COMPRESSED
from trimaran.runtime.data.sources import usable_files
from trimaran.runtime.files import read_json

# A task should take seconds: a worker that dies loses as much, and at the end of a stage the others wait as long.
PART_BYTES: Final = 16 << 20
# Of what cleaning writes, so that a packed file becomes many tasks too; a part with its last line is still one piece.
PIECE_BYTES: Final = PART_BYTES * 5 // 4
SUFFIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".warc": "warc",
        ".wet": "wet",
        ".html": "html",
        ".htm": "html",
        ".xhtml": "html",
        ".txt": "txt",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "json",
        ".csv": "csv",
        ".tsv": "tsv",
        ".parquet": "parquet",
        ".arrow": "arrow",
        ".bin": "megatron",
    }
)
FORMATS: Final = tuple(READERS)
"""What `data.corpora.NAME.format` may be."""
_PICKLES: Final = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
# Beside the files that `datasets` saves, and beside a .bin.
_DESCRIPTIONS: Final = ("state.json", "dataset_info.json", "dataset_dict.json")
_SPLITS: Final[Mapping[str, Callable[[Part, ReadSettings, int], list[tuple[int, int, int]]]]] = MappingProxyType(
    {"parquet": split_parquet, "arrow": split_arrow, "megatron": split_megatron}
)


class _File(NamedTuple):
    """A file that was found: path or address, name in the ids, size, stamp, and what is the same for the same file."""

    file: str
    name: str
    size: int
    stamp: str
    identity: str


def find_parts(
    corpus: str,
    sources: Sequence[str],
    settings: ReadSettings,
    account: Account,
    *,
    format: str | None = None,
    cache_dir: Path | None = None,
    part_bytes: int = PART_BYTES,
) -> tuple[Part, ...]:
    """Return the parts of a corpus in a fixed order, and note in `account` what is passed over.

    Sources keep their order and names are sorted within each. A file that is found twice is read once. The ids of
    documents depend on the sources and the names of their files, not on `part_bytes`.

    Args:
        sources: files, folders, globs, and addresses of these such as s3://bucket/folder/*.warc.gz.
        format: one of FORMATS, for files of any suffix; None: the suffix tells.
        part_bytes: about the bytes of a part of a file that can be split. Packed files (see `slices`), .csv, .html,
            .txt and web archives are one part each.

    Raises:
        DataError: a source doesn't exist, holds no file of these formats, or is a pickle.
        OSError: it can't be reached.
    """
    field, found, names = f"data.corpora.{corpus}.source", dict[str, _File](), set[str]()
    for source in sources:
        usable = 0
        for file in _files(field, source, format, account, cache_dir):
            usable += 1
            if file.identity in found:
                account.note("twice", file.file, amount=file.size)
            else:
                account.totals["file_bytes"] += file.size
                found[file.identity] = file._replace(name=_unique(file.name, names))
        if not usable:
            met = f" ({account.told()})" if account.noticed else ""
            known = ", ".join(SUFFIXES) if format is None else f"file of format {format}"
            raise DataError(
                f"{field} {source!r} holds no {known}{met}; name such files, plain or packed as "
                f"{', '.join(COMPRESSED)}, or a folder or glob of them"
            )
    whole = [_whole(corpus, file, format) for file in found.values()]
    parts = [piece for part in whole for piece in _split(part, settings, part_bytes)]
    return tuple(replace(part, index=index) for index, part in enumerate(parts))


def check_first(parts: Sequence[Part], settings: ReadSettings) -> None:
    """Raise DataError where the first document of a format has no text, as where `text_field` is wrong.

    It reads the begin of one file of each format.
    """
    for part in {part.format: part for part in reversed(parts)}.values():
        with closing(read_part(part, settings)) as documents:
            first = next(documents, None)
        if isinstance(first, Loss) and first.reason in ("read.no_field", "read.not_text", "read.no_object"):
            field = f"data.corpora.{part.corpus}.text_field"
            raise DataError(f"{first.place}: {first.detail}; set {field} to the field or column with the text")


def _unique(name: str, names: set[str]) -> str:
    """Return a name that no other file of the corpus has: the second x.jsonl is x.jsonl~2."""
    unique, number = name, 1
    while unique in names:
        number += 1
        unique = f"{name}~{number}"
    names.add(unique)
    return unique


def _suffixes(name: str) -> tuple[str, str]:
    """Return (suffix, suffix of the compression) of a file name."""
    name = name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return posixpath.splitext(name.removesuffix(packed))[1], packed


def _format_of(name: str, format: str | None) -> str:
    """Return a file's format, "" for one that can't be read, and "pickle" or "description"."""
    suffix, packed = _suffixes(name)
    if suffix in _PICKLES:
        return "pickle"
    if name in _DESCRIPTIONS or suffix == ".idx":
        return "description"
    found = format or SUFFIXES.get(suffix, "")
    return "" if found == "megatron" and (packed or suffix != ".bin") else found


def _files(field: str, source: str, format: str | None, account: Account, cache_dir: Path | None) -> Iterator[_File]:
    if _format_of(posixpath.basename(source), format) == "pickle" and not _has_sign(source):
        raise DataError(f"{field} {source!r} is a pickle, which can run code; convert it to .jsonl or .parquet")
    if is_remote(source) and not source.startswith("file://"):
        found = _remote(field, source, format, account)
    else:
        found = _local(field, source.removeprefix("file://"), format, account, cache_dir)
    for file in found:
        kind = _format_of(posixpath.basename(file.file), format)
        if kind == "pickle":
            account.note("pickle", file.file, amount=file.size)
        elif kind == "megatron" and not _exists(index_file(file.file)):
            account.totals["file_bytes"] += file.size
            account.note("other_kind", file.file, amount=file.size, kind=".bin without .idx")
        elif kind != "description":
            yield file


def _exists(file: str) -> bool:
    if not is_remote(file):
        return Path(file).is_file()
    system, path = file_system(file)
    return bool(asking(file, lambda: system.exists(path)))


def _has_sign(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _local(field: str, source: str, format: str | None, account: Account, cache_dir: Path | None) -> Iterator[_File]:
    start = Path(source).expanduser()
    fixed = list(takewhile(lambda part: not _has_sign(part), start.parts))
    root = start.parent if start.is_file() else start if start.is_dir() else Path(*fixed)
    listed: dict[Path, frozenset[str] | None] = {}
    try:
        for path, size in usable_files(source, account, lambda path: _format_of(path.name, format), cache_dir):
            if path.parent not in listed:
                listed[path.parent] = _listed(path.parent)
            names = listed[path.parent]
            if names is not None and path.suffix == ".arrow" and path.name not in names:
                account.note("unlisted", str(path), amount=size)
                continue
            name = path.relative_to(root).as_posix()
            yield _File(os.path.abspath(path), name, size, stamp_of(path.stat()), os.path.realpath(path))
    except DataError as error:
        raise DataError(str(error).replace("data.source", field, 1)) from None


def _listed(folder: Path) -> frozenset[str] | None:
    """Return the .arrow files that `datasets` lists in a folder; an earlier save may have left others there."""
    try:
        state = read_json(folder / "state.json")
        return frozenset(file["filename"] for file in state["_data_files"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remote(field: str, source: str, format: str | None, account: Account) -> Iterator[_File]:
    system, path = file_system(source)
    found: dict[str, Any] = asking(source, lambda: _list(system, path))
    if not found:
        raise DataError(f"{field} {source!r} does not exist, or is an empty folder; correct the address")
    fixed = "/".join(takewhile(lambda part: not _has_sign(part), path.split("/")))
    root = posixpath.dirname(path) if path in found else fixed
    for file, info in sorted(found.items()):
        name, size, address = file.removeprefix(root).lstrip("/"), info["size"], system.unstrip_protocol(file)
        if any(part.startswith(".") for part in name.split("/")):
            account.note("hidden", address, amount=0)
        elif not _format_of(posixpath.basename(file), format):
            account.totals["file_bytes"] += size
            suffix = "".join(_suffixes(posixpath.basename(file)))
            account.note("other_kind", address, amount=size, kind=suffix or "without suffix")
        elif not size:
            account.note("empty_file", address, amount=0)
        else:
            yield _File(address, name, size, stamp_of(info), address)


def _list(system: Any, path: str) -> dict[str, Any]:
    """Return what is known of every file that an address or a glob of addresses stands for, of folders all below."""
    if _has_sign(path):
        matches = system.glob(path, detail=True)
    else:
        try:
            matches = {path: system.info(path)}
        except FileNotFoundError:
            return {}
    found: dict[str, Any] = {}
    for match, info in matches.items():
        found |= {match: info} if info["type"] == "file" else system.find(match, detail=True)
    return found


def _whole(corpus: str, file: _File, format: str | None) -> Part:
    kind = _format_of(posixpath.basename(file.file), format)
    packed = _suffixes(posixpath.basename(file.file))[1]
    return Part(corpus, file.file, file.name, kind, packed, file.size, file.stamp, part_bytes=file.size)


def _split(part: Part, settings: ReadSettings, part_bytes: int) -> list[Part]:
    """Return the parts of a file: itself where it is small, packed, or of a format that isn't split."""
    if part.compression or part.file_bytes <= part_bytes or (part.format == "arrow" and is_remote(part.file)):
        return [part]
    if part.format in ("jsonl", "lines"):
        with open_raw(part) as file:
            if utf16_mark(file.peek(4)[:4]):
                return [part]
        starts = range(0, part.file_bytes, part_bytes)
        ranges = [(start, min(start + part_bytes, part.file_bytes), part_bytes) for start in starts]
    elif part.format in _SPLITS:
        try:
            ranges = _SPLITS[part.format](part, settings, part_bytes)
        except Damage:  # whoever reads it tells
            return [part]
    else:
        return [part]
    return [replace(part, start=start, stop=stop, part_bytes=size) for start, stop, size in ranges]
