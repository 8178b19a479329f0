"""What the fields of several sections are made of: names in paths, shares, and the settings of a section."""

import os
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.yaml_text import MOST_BYTES

# Only a text with a bound is looked at by pydantic, which then refuses half surrogate pairs too.
SECTION_CONFIG: Final = ConfigDict(frozen=True, extra="forbid", strict=True, str_max_length=MOST_BYTES)

_MOST_NAME = 255
"""Bytes of a name in a path, on every usual file system."""
_MOST_OWN_NAME = 200
"""Of a folder that a run makes: the names of its lock and of temporary files are longer."""


def _check_path(path: str, most: int = _MOST_NAME) -> str:
    if not path.strip():
        raise ValueError("must name a file or folder, got an empty text; write a path such as runs/first")
    if path != path.strip():
        raise ValueError(f"must not begin or end with a space, got {path!r}; write {path.strip()!r}")
    if "\0" in path:
        raise ValueError(f"must not contain a NUL character, got {path!r}; write a path such as runs/first")
    if path.startswith("~"):
        raise ValueError(
            f"must be a path as it is, because ~ is not expanded, got {path!r}; write the home folder out in full"
        )
    if max(len(name.encode(errors="replace")) for name in path.split("/")) > most:
        raise ValueError(f"must have names of at most {most} bytes, got {show(path)}; write a shorter one")
    return path


def _check_folder(path: str) -> str:
    if os.path.normpath(_check_path(path, _MOST_OWN_NAME)) in (".", "..", "/", "//"):
        raise ValueError(f"must be a folder of its own, got {path!r}; write a path such as runs/first")
    if ".." in path.split("/"):
        raise ValueError(f"must not climb by .., got {path!r}; write the folder out in full")
    return path


Folder = Annotated[str, AfterValidator(_check_folder)]
FilePath = Annotated[str, AfterValidator(_check_path)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def _switch(value: object) -> object:
    """Take true for the defaults of a record, and false for no record."""
    return ({} if value else None) if isinstance(value, bool) else value


def switch(record: type[BaseModel]) -> BeforeValidator:
    """Return what lets a field of `record | None` be true, with the record's defaults, or false, for none."""
    return BeforeValidator(_switch, json_schema_input_type=record | bool | None)
