"""twin.json: what a twin was made of and how, so that the same command goes on and another is refused. No torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import open_regular, read_bytes, write_text
from trimaran.runtime.twin.decide import Decision
from trimaran.runtime.twin.request import TwinRequest

TWIN: Final = "twin"
"""The twin's folder in a run folder."""
RECORD: Final = "twin.json"
VERSION: Final = 1
_MOST_BYTES: Final = 16 << 20
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(BaseModel):
    """A file that was read, as the user has named it."""

    model_config = _FROZEN

    file: str
    sha256: str
    num_bytes: int


class WorkRecord(BaseModel):
    """A work; its text is `works/NUMBER.txt`."""

    model_config = _FROZEN

    number: int
    file: str
    title: str
    author: str
    language: str
    characters: int


class TwinRecord(BaseModel):
    """A twin.

    Attributes:
        author, character: whose voice it is; null for a character where it is the author's.
        language: of most of the texts; ISO 639-1 code.
        system: the system message of every conversation, in training and after it.
        model: the run whose model is tuned, as the user has named it; null for one from scratch.
        characters: of all turns of the examples, without the system message.
        held_out: names of what is held out.
        counts: of passages and examples, and of what gave none, by reason.
        left: what was left out of the files or changed in them, by reason.
    """

    model_config = _FROZEN

    version: Literal[1] = VERSION
    author: str
    character: str | None
    language: str
    system: str
    model: str | None
    sources: tuple[SourceRecord, ...]
    works: tuple[WorkRecord, ...]
    decision: Decision
    epochs: float = Field(gt=0)
    characters: int
    held_out: tuple[str, ...]
    counts: Mapping[str, int]
    left: Mapping[str, int]

    def write(self, folder: Path) -> None:
        """Write the record into a twin's folder; it is written last, so a folder with it is whole."""
        write_text(folder / RECORD, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> "TwinRecord":
        """Return the record of a twin's folder.

        Raises:
            DataError: there is none, or it is not one of this version.
        """
        path = folder / RECORD
        if not path.is_file():
            raise DataError(f"{path.parent.parent} holds no twin: {path} is missing; make it by trimaran twin build")
        try:
            values = json.loads(read_bytes(path, _MOST_BYTES))
            if isinstance(values, dict) and values.get("version") != VERSION:
                raise DataError(
                    f"{path} is of version {values.get('version')!r}, and this trimaran reads version {VERSION}; "
                    "build the twin again in another folder"
                )
            return TwinRecord.model_validate(values)
        except (ValidationError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            first = str(error).splitlines()[0]
            raise DataError(f"{path} is damaged ({first}); remove the folder and build the twin again") from error


def source_record(path: Path, name: str) -> SourceRecord:
    """Return the record of a file, with the digest of its bytes.

    Raises:
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SourceRecord(file=name, sha256=digest, num_bytes=file.tell())


def check_same_twin(record: TwinRecord, request: TwinRequest, sources: Sequence[str]) -> None:
    """Refuse to go on with a folder in which another twin lives.

    Args:
        sources: digests of the files.

    Raises:
        ValueError: says what differs and what would do.
    """
    of = f"{record.character} of {record.author}" if record.character else record.author
    method = record.decision.method
    differences = [
        f"its {what} is {_shown(mine)}, not {_shown(asked)}"
        for what, mine, asked in (
            ("author", record.author, request.author),
            ("character", record.character, request.character),
            ("model", record.model, record.model if _is_same(record.model, request.model) else request.model),
            ("language", record.language, request.language or record.language),
            ("method", method, request.method or method),
        )
        if mine != asked
    ]
    if sorted(each.sha256 for each in record.sources) != sorted(sources):
        differences.append("it was made of other sources, or they have changed since")
    if differences:
        raise ValueError(
            f"--output {request.output} holds the twin of {of} already: {'; '.join(differences)}; choose another "
            "--output, or remove that folder"
        )


def _is_same(mine: str | None, asked: str | None) -> bool:
    return mine is not None and asked is not None and Path(mine).resolve() == Path(asked).resolve()


def _shown(value: str | None) -> str:
    return "none" if value is None else repr(value)
