"""The tree of a spec: records in records, mappings and lists, and the paths that lead through it.

A path is `data.corpora.web.weight` or `data.stages[0].tokens`; that of every corpus is `data.corpora.NAME.weight`, and
that of every stage `data.stages[N].tokens`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

Part: TypeAlias = str | int
"""One step of a path: a name, or the place of an item in a list."""

_MOST_NAME: Final = 200
"""Characters of a name in a path; no name of a field or a corpus has more."""
_PIECE: Final = re.compile(r"([^\[\]]+)((?:\[(?:\d+|N)\])*)")


def step(path: str, part: Part) -> str:
    """Return the path of what stands at `part` in what stands at `path`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    part = part if len(part) <= _MOST_NAME else f"{part[: _MOST_NAME - 3]}..."
    return f"{path}.{part}" if path else part


def parts_of(path: str) -> list[Part]:
    """Return the steps of a path; the N of every item is 0. A name that can't be one of a field stays as it is."""
    parts: list[Part] = []
    for piece in path.split(".") if path else ():
        match = _PIECE.fullmatch(piece)
        name, items = match.groups() if match else (piece, "")
        parts += [name, *(0 if each == "N" else int(each[:9]) for each in re.findall(r"\w+", items))]
    return parts


def above(path: str) -> str:
    """Return the path of what holds the field or item at `path`; "" is the whole spec."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def name_in(path: str) -> str:
    """Return the last name of a path."""
    return path.rpartition(".")[2]


def ways_to(path: str) -> Iterator[str]:
    """Yield a path and those of all that holds it, the whole spec last."""
    while path:
        yield path
        path = above(path)
    yield ""


def is_within(path: str, outer: str) -> bool:
    """Return whether `path` is `outer` or leads to something in it."""
    return path == outer or path.startswith((f"{outer}.", f"{outer}["))


@dataclass(frozen=True)
class Place:
    """What may stand at a path.

    Attributes:
        kind: its type.
        field: the field that it is, or whose item it is; None for the whole spec.
        is_item: whether it is an item of a list or a mapping.
    """

    kind: Any
    field: FieldInfo | None = None
    is_item: bool = False

    @cached_property
    def choices(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        return tuple(each for each in _alternatives(self.kind) if each is not NoneType)

    @cached_property
    def record(self) -> type[BaseModel] | None:
        """The record that may stand here."""
        return next((each for each in self.choices if _is_record(each)), None)

    @property
    def is_section(self) -> bool:
        """Whether it is a record that is always there."""
        return _is_record(self.kind) and not self.is_item

    @property
    def holds_names(self) -> bool:
        """Whether a record or a mapping may stand here."""
        return bool(self.record or self._item(dict))

    @property
    def is_optional(self) -> bool:
        """Whether null may stand here."""
        return NoneType in _alternatives(self.kind)

    @property
    def is_switch(self) -> bool:
        """Whether true and false may stand here for a record, of its defaults and none."""
        metadata = self.field.metadata if self.field and not self.is_item else ()
        others = (each.json_schema_input_type for each in metadata if isinstance(each, BeforeValidator))
        return self.record is not None and any(bool in _alternatives(kind) for kind in (self.kind, *others))

    def inside(self, part: Part) -> "Place | None":
        """Return what may stand one step further, None where nothing may."""
        if isinstance(part, str) and self.record and part in self.record.model_fields:
            field = self.record.model_fields[part]
            return Place(field.annotation, field)
        item = self._item(list, tuple) if isinstance(part, int) else self._item(dict)
        return None if item is None else Place(item, self.field, is_item=True)

    def under(self, name: str) -> "Place":
        """Return what may stand in a field of the record."""
        place = self.inside(name)
        assert place is not None, f"{name} is a field"
        return place

    def _item(self, *containers: type) -> Any:
        """Return the type of the items of such a container, None where none may stand here."""
        kinds = (get_args(each) for each in self.choices if get_origin(each) in containers)
        return next((kind[0] if tuple in containers else kind[1] for kind in kinds), None)

    def paths(self, path: str = "") -> Iterator[str]:
        """Yield the path of everything that may stand in it, in order."""
        for name in self.record.model_fields if self.record else ():
            yield step(path, name)
            yield from self.under(name).paths(step(path, name))
        for part, words in (("NAME", ".NAME"), (0, "[N]")):
            item = self.inside(part)
            if item is not None and item.is_item:
                yield from item.paths(path + words)


def _alternatives(kind: Any) -> Iterator[Any]:
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for each in get_args(kind):
            yield from _alternatives(each)
    else:
        yield kind


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def item_at(value: object, part: Part) -> Any:
    """Return what stands at one step in a mapping or a list, ... where nothing does."""
    if isinstance(part, str):
        return value.get(part, ...) if isinstance(value, Mapping) else ...
    return value[part] if isinstance(value, list) and part < len(value) else ...


def is_given(raw: Mapping[str, Any], path: str) -> bool:
    """Return whether something stands at the path, be it null."""
    value: Any = raw
    for part in parts_of(path):
        value = item_at(value, part)
    return value is not ...


def lacking_paths(value: object, path: str = "") -> Iterator[str]:
    """Yield the path of every field that a record of a draft lacks; an item's stands for those of all items."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            if name in vars(value):
                yield from lacking_paths(vars(value)[name], step(path, name))
            else:
                yield step(path, name)
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from lacking_paths(each, path + (".NAME" if isinstance(value, dict) else "[N]"))
