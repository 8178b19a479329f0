"""The files among an author's sources: files by name, and folders with all that is in them."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trimaran.runtime.data.files import DataError
from trimaran.runtime.twin.texts.work import Left

KINDS: Final = MappingProxyType(
    {
        ".txt": "txt", ".text": "txt", ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html",
        ".xhtml": "html", ".epub": "epub", ".pdf": "pdf",
    }
)  # fmt: skip
"""Suffix of a file -> the reader for it."""
READ: Final = ".txt, .md, .html, .epub or .pdf"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read: where it is, as the user has named it, and the kind of reader."""

    path: Path
    name: str
    kind: str


def find_sources(sources: Sequence[str]) -> tuple[list[SourceFile], list[Left]]:
    """Return the files to read, those of a folder sorted by name, and the files that no reader is for.

    A file that is named twice, or a link to one, is one file. Names that begin with a dot are passed over in folders.

    Raises:
        DataError: a source is missing or of no kind that can be read, or a folder has no text.
    """
    if not sources:
        raise DataError(f"no source was named; name files ({READ}) or folders of them")
    found: dict[Path, SourceFile] = {}
    left: list[Left] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files, others = _in_folder(source)
            left += others
        elif not path.exists():
            raise DataError(f"{source}: there is no such file or folder")
        elif path.suffix.lower() not in KINDS:
            raise DataError(f"{source}: {path.suffix or 'a file without a suffix'} is not read; what is: {READ}")
        else:
            files = [SourceFile(path, source, KINDS[path.suffix.lower()])]
        for file in files:
            if file.path.resolve() in found:
                left.append(Left(file.name, "file.copy", f"the same file as {found[file.path.resolve()].name}"))
            else:
                found[file.path.resolve()] = file
    return list(found.values()), left


def _in_folder(folder: str) -> tuple[list[SourceFile], list[Left]]:
    files, others = list[SourceFile](), Counter[str]()
    for top, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            path = Path(top, name)
            if name.startswith("."):
                others["hidden"] += 1
            elif path.suffix.lower() not in KINDS or not _is_regular(path):
                others[path.suffix.lower() or "without a suffix"] += 1
            else:
                files.append(SourceFile(path, str(path), KINDS[path.suffix.lower()]))
    told = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    if not files:
        raise DataError(f"{folder}: the folder has no text ({READ}){told and f'; passed over: {told}'}")
    return files, [Left(folder, "file.kind", told, others.total())] if others else []


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing
        return False
