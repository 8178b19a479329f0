"""From `data.source` to the files of the corpus, each with its kind; what is passed over goes to the account."""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Final

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.files import DataError, unreadable

QUICKSTART: Final = "quickstart"
"""Name of the source that is no file: the corpus of quickstart.py."""
# By suffix, in lower case: how a file holds documents. A .json file has JSON lines, or one record or a list of them.
KINDS: Final = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
COMPRESSED: Final = (".gz", ".bz2", ".xz")
SECTION_CHARACTERS: Final = 32 * 1024
"""Documents above this are cut at blank lines, so that one book can lie partly in the training and partly in the
held-out split."""
# Of one folder: their names take 300 MB, and looking at them a minute.
_MOST_FILES = 1_000_000
READABLE = f"{', '.join(KINDS)} file (or {', '.join(COMPRESSED)} of one, or Megatron's .bin with its .idx)"
MEGATRON: Final = "megatron"
"""The kind of a .bin that has an .idx beside it: token ids."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus, and the JSON field that holds its text (not for .txt)."""

    path: Path
    text_field: str

    @property
    def kind(self) -> str:
        """One of the values of KINDS, MEGATRON, or "" for a file of another kind."""
        suffix, packed = _suffixes(self.path)
        if suffix == ".bin" and not packed and self.path.with_suffix(".idx").is_file():
            return MEGATRON
        return KINDS.get(suffix, "")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file, and the .idx of a .bin."""
        return (self.path, self.path.with_suffix(".idx")) if self.kind == MEGATRON else (self.path,)

    @property
    def compression(self) -> str:
        """One of COMPRESSED, or ""."""
        return _suffixes(self.path)[1]


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that says the kind and that of the compression, "" where there is none."""
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return os.path.splitext(name.removesuffix(packed))[1], packed


def find_files(
    sources: Sequence[str], text_field: str, account: Account, cache_dir: Path | None = None
) -> list[SourceFile]:
    """Return the corpus files of the sources in a fixed order, and note in `account` what is passed over.

    A .bin and .idx may be named by either, or without a suffix. A folder is searched recursively, without hidden files
    and folders and `cache_dir`; links to folders are followed, and each folder is read once, so that loops of links
    end. Names are sorted within each source, and sources keep their order. A file named twice is read once. Raises
    DataError for a source that doesn't exist, matches no usable file, or is a file of another kind, and for a folder
    that can't be read, has more than a million files, or leads to where no corpus is (`_strays`).
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        usable = 0
        for path, size in usable_files(_bin_of(source), account, lambda path: SourceFile(path, "").kind, cache_dir):
            usable += 1
            place = os.path.realpath(path)
            if place in found:
                account.note("twice", str(path), amount=size)
            else:
                account.totals["file_bytes"] += size
                found[place] = SourceFile(path, text_field)
        if not usable:
            met = f" ({account.told()})" if account.noticed else ""
            raise DataError(
                f"data.source {source!r} holds no {READABLE}{met}; name such files, a folder or a glob of them"
            )
    if not found:
        raise DataError("data.source is empty; name at least one file, folder or glob, or 'quickstart'")
    return list(found.values())


def usable_files(
    source: str, account: Account, kind_of: Callable[[Path], str], cache_dir: Path | None = None
) -> Iterator[tuple[Path, int]]:
    """Yield (path, size) of the files of a source that may be read, and note in `account` what is passed over.

    Args:
        kind_of: returns "" for a file of a kind that isn't read.
    """
    for path, hidden in _expand(source, Path(source).expanduser(), cache_dir, kind_of):
        size, regular = _look_at(path)
        if hidden or not regular:
            account.note("hidden" if hidden else "special", str(path), amount=0)
            continue
        if _leads_nowhere(path):
            raise DataError(f"data.source {source!r}: {path} is a link that leads nowhere; mend or remove it")
        if not kind_of(path):
            if _is_index(path) and kind_of(path.with_suffix(".bin")):
                continue  # it is read with its .bin
            account.totals["file_bytes"] += size
            account.note("other_kind", str(path), amount=size, kind="".join(_suffixes(path)) or "without suffix")
            continue
        if not size:
            account.note("empty_file", str(path), amount=0)
            continue
        yield path, size


def _bin_of(source: str) -> str:
    """Return the .bin of a source that names Megatron's pair by its prefix or its .idx, otherwise the source."""
    path = Path(source).expanduser()
    if path.suffix != ".idx" and path.exists():
        return source
    prefix = str(path).removesuffix(".idx")
    return f"{prefix}.bin" if Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file() else source


def _is_index(path: Path) -> bool:
    return path.suffix == ".idx" and path.with_suffix(".bin").is_file()


def _leads_nowhere(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return path.is_symlink()
    except OSError:  # a link to itself, which has no text
        return False
    return False


def _look_at(path: Path) -> tuple[int, bool]:
    """Return a file's size and whether it may be opened: reading a pipe waits for ever."""
    try:
        status = path.stat()
    except OSError:
        return 0, True
    return status.st_size, stat.S_ISREG(status.st_mode)


def _expand(
    source: str, path: Path, cache_dir: Path | None, kind_of: Callable[[Path], str]
) -> Iterator[tuple[Path, bool]]:
    """Yield every file of a source, and whether it is hidden: its name, or a folder's on the way from the source."""
    if path.is_dir():
        for file in _walk(path, cache_dir):
            yield file, any(part.startswith(".") for part in file.relative_to(path).parts)
    elif path.exists() or path.is_symlink():
        if not kind_of(path) or not _look_at(path)[1]:
            raise DataError(f"data.source {source!r} is not a {READABLE}; convert it, or name another file")
        yield path, False
    elif any(sign in source for sign in "*?["):
        yield from _matches(path, cache_dir, kind_of)
    else:
        raise DataError(
            f"data.source {source!r} does not exist (seen from {Path.cwd()}); correct the path, or use 'quickstart'"
        )


def _matches(pattern: Path, cache_dir: Path | None, kind_of: Callable[[Path], str]) -> Iterator[tuple[Path, bool]]:
    """Yield the files that a glob matches, and those of the folders that it matches.

    `**` stands for any number of folders. Python's own glob would follow a loop of links to its end, which may be for
    ever, so folders below `**` are walked here.
    """
    parts = pattern.parts
    if "**" not in parts:
        for match in sorted(map(Path, glob(str(pattern)))):
            yield from _expand(str(match), match, cache_dir, kind_of) if match.is_dir() else [(match, False)]
        return
    first = parts.index("**")
    wants_hidden = any(part.startswith(".") for part in parts[first:])
    for root in sorted(map(Path, glob(str(Path(*parts[:first]))))) if first else [Path()]:
        for path in _walk(root, cache_dir):
            names = path.relative_to(root).parts
            if _fits(names, parts[first:]):
                yield path, not wants_hidden and any(name.startswith(".") for name in names)


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or _fits(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _walk(root: Path, cache_dir: Path | None) -> list[Path]:
    """Return every file below a folder, sorted. Links to folders come after folders, so that these keep their names."""
    files, folders = [], deque([root])
    seen = {_identity(cache_dir)} if cache_dir is not None and cache_dir.is_dir() else set()
    strays, met = _strays(root), 0
    while folders:
        folder = folders.popleft()
        try:
            identity = _identity(folder)
            if stray := strays.get(identity) or strays.get(identity[:1]):
                place = f"{folder} leads to {folder.resolve()}, {stray}"
                raise DataError(f"data.source: {place}; remove it, or name the folders and files that are meant")
            with os.scandir(folder) as found:
                entries = sorted(islice(found, _MOST_FILES), key=lambda entry: entry.name)
        except (OSError, DataError) as error:
            if not folder.name.startswith("."):
                raise (unreadable(folder, error) if isinstance(error, OSError) else error) from None
            files.append(folder)
            continue
        if identity in seen:
            continue
        seen.add(identity)
        met += len(entries)
        if met >= _MOST_FILES:
            limit = f"data.source: {root} has {_MOST_FILES:,} files or more"
            raise DataError(f"{limit}; name its folders one by one, or put the text into fewer files")
        for entry in entries:
            # Anything that isn't a folder counts as a file: a broken link is refused, not skipped.
            if not _is_folder(entry):
                files.append(Path(entry.path))
            elif entry.is_symlink():
                folders.append(Path(entry.path))
            else:
                folders.appendleft(Path(entry.path))
    return sorted(files)


def _strays(root: Path) -> dict[tuple[int, ...], str]:
    """Return where a walk of `root` must not get and why: a folder, or a whole file system by its device."""
    above = dict.fromkeys(map(_identity, (Path("/"), *root.resolve().parents)), "which holds far more than a corpus")
    kernel = [_identity(Path(mount))[:1] for mount in ("/proc", "/sys") if os.path.ismount(mount)]
    return {**above, **dict.fromkeys(kernel, "whose files the kernel makes up")}


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, ...]:
    status = folder.stat()
    return status.st_dev, status.st_ino
