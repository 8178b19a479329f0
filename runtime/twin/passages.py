"""A passage of an author's texts with its provenance, and the passages in a twin's folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.files import parse_json, read_text, write_text


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive paragraphs of one chapter of one work.

    Args:
        id: number among all passages of the twin, from 0, in the order of works.
        work: number of the work; its cleaned text is `works/NUMBER.txt` (five digits) in the twin's folder.
        file: the source as the user has named it.
        title: of the work.
        chapter: its heading, or act and scene; "" where the work has none.
        start, end: characters of the cleaned text of the work, end exclusive.
        first_line, last_line: lines of the cleaned text, counted from 1.
        text: exactly the cleaned text's characters [start, end).
        is_held_out: whether no training example and no index may use it.
    """

    id: int
    work: int
    file: str
    title: str
    chapter: str
    start: int
    end: int
    first_line: int
    last_line: int
    text: str
    is_held_out: bool


_FIELDS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "id": int, "work": int, "file": str, "title": str, "chapter": str, "start": int, "end": int,
        "first_line": int, "last_line": int, "text": str, "is_held_out": bool,
    }
)  # fmt: skip


def write_texts(folder: Path, texts: Sequence[str], passages: Sequence[Passage]) -> None:
    """Write `works/NUMBER.txt` and `passages.jsonl` into a twin's folder.

    Args:
        texts: the cleaned text of each work, by its number.

    Raises:
        OSError: they can't be written.
    """
    (folder / "works").mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        write_text(work_file(folder, number), text)
    write_text(
        folder / "passages.jsonl", "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in passages)
    )


def work_file(folder: Path, number: int) -> Path:
    """Return where a work's cleaned text is in a twin's folder."""
    return folder / "works" / f"{number:05}.txt"


def read_passages(folder: Path) -> list[Passage]:
    """Return the passages of a twin's folder.

    Raises:
        DataError: the file is missing, or a line of it is no passage.
    """
    path = folder / "passages.jsonl"
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error, "run trimaran twin build again, which makes it anew") from error
    passages = list[Passage]()
    for number, line in enumerate(lines, 1):
        if line:
            passages.append(_parse(path, number, line, len(passages)))
    return passages


def _parse(path: Path, number: int, line: str, expected: int) -> Passage:
    try:
        values = parse_json(line)
        fields = {name: kind(values.pop(name)) for name, kind in _FIELDS.items() if type(values[name]) is kind}
        if values or len(fields) != len(_FIELDS) or fields["id"] != expected:
            raise ValueError(f"it is not passage {expected}, or has other fields than {', '.join(_FIELDS)}")
        return Passage(**fields)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}:{number}: it is no passage of a twin ({error}); build the twin again") from None
