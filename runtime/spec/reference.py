"""Every field of a spec in words: type, default, rule and description, out of the spec's own records. No torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trimaran.models.fields import counted, one_of
from trimaran.models.shape.rules import SHAPE_RULES
from trimaran.runtime.spec.names import SPEC, known_paths, nearest_path, place_of
from trimaran.runtime.spec.rules import RULES
from trimaran.runtime.spec.tree import Place, above, is_within, parts_of, step

_NAMES: Final = MappingProxyType({bool: "true or false", int: "whole number", float: "number", str: "text"})
_PLURALS: Final = MappingProxyType({"whole number": "whole numbers", "number": "numbers", "text": "texts"})
_BOUNDS: Final = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
_ANY_BOUND: Final = 2**31 - 1  # from here on a bound keeps out slips of the keyboard alone


@dataclass(frozen=True)
class Described:
    """A field in words.

    Attributes:
        path: such as parallel.tp; NAME stands for a name of the user's, [N] for the place in a list.
        default: as a spec would say it, or `required`.
        rule: its range, and the fields that are checked together with it; "" where there is neither.
    """

    path: str
    kind: str
    default: str
    rule: str
    description: str


def sections() -> list[tuple[str, str, int]]:
    """Return name, description and number of fields of each section, and of the fields beside them."""
    return [
        (name, str(field.description), len(fields_in(name))) for name, field in SPEC.choices[0].model_fields.items()
    ]


def fields_in(name: str) -> list[Described]:
    """Return the fields at a path: of a section or record all in it, of a field itself.

    Raises:
        ValueError: there is none; names the nearest.
    """
    place = place_of(name)
    if place is None or not name:
        near = nearest_path(name) or nearest_path(name.rpartition(".")[2])
        meant = f"did you mean {near}?" if near else f"the sections are {', '.join(SPEC.choices[0].model_fields)}"
        raise ValueError(f"a spec has no section or field {name!r}; {meant}")
    name = _with_any_item(name)
    found = [path for path in known_paths() if is_within(path, name) and not _is_plain_section(path)]
    return [_described(path) for path in found] or fields_in(above(name))  # an item that is no record


def _with_any_item(path: str) -> str:
    """Return the path as that of every item: data.corpora.web.weight is data.corpora.NAME.weight."""
    place, found = SPEC, ""
    for part in parts_of(path):
        inner = place.inside(part)
        assert inner is not None, "asked of paths that are known"
        any_item = "[N]" if isinstance(part, int) else ".NAME" if inner.is_item else ""
        place, found = inner, found + any_item if any_item else step(found, part)
    return found


def _is_plain_section(path: str) -> bool:
    place = place_of(path)
    return place is not None and place.is_section


def _described(path: str) -> Described:
    place = place_of(path)
    assert place is not None, "the path is of the list of all"
    assert place.field is not None, "only the whole spec is no field"
    kind, bounds = _words(place.kind, tuple(place.field.metadata))
    if place.is_switch:
        kind = one_of(["true", "false", *kind.split(" or ")])
    others = _checked_with(path)
    together = f"checked together with {', '.join(others)}" if others else ""
    rule = "; ".join(each for each in (bounds, together) if each)
    return Described(path, kind, default_of(place), rule, str(place.field.description))


def default_of(place: Place) -> str:
    """Return the default of the field at a place as a spec would say it, or `required`."""
    assert place.field is not None, "only the whole spec is no field"
    if place.field.is_required():
        return "required"
    value = place.field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        value = True if place.is_switch else {}
    return json.dumps(value)


def _words(kind: Any, metadata: Sequence[Any] = ()) -> tuple[str, str]:
    """Return a type in words, and its range."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(arguments[0], (*metadata, *_flat(arguments[1:])))
    if origin in (Union, UnionType):
        found = [_words(each, metadata) for each in arguments if each is not NoneType]
        names = [name for name, _ in found] + (["null"] if NoneType in arguments else [])
        return one_of(names), ", or ".join(bounds for _, bounds in found if bounds)
    if origin is Literal:
        return one_of(arguments), ""
    if origin in (list, tuple):
        item, bounds = _words(arguments[0])
        each = bounds and f"each {bounds}"
        return f"list of {_PLURALS.get(item, item)}", "; ".join(part for part in (_length(metadata), each) if part)
    if origin is dict:
        item, bounds = _words(arguments[1])
        return f"names, each with {item}", bounds and f"each {bounds}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section", ""
    return _NAMES.get(kind, str(kind)), _range(metadata)


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _range(metadata: Sequence[Any]) -> str:
    found = [
        f"{words} {limit:g}"
        for key, words in _BOUNDS
        for each in metadata
        if (limit := getattr(each, key, None)) is not None and limit < _ANY_BOUND
    ]
    return " and ".join(found)


def _length(metadata: Sequence[Any]) -> str:
    least, most = (
        next((getattr(each, name) for each in metadata if hasattr(each, name)), None)
        for name in ("min_length", "max_length")
    )
    if least is not None and least == most:
        return counted(least, "item")
    ends = [f"at least {counted(least, 'item')}"] if least else []
    return " and ".join([*ends, *([f"at most {most:,}"] if most is not None else [])])


def _checked_with(path: str) -> list[str]:
    """Return the other fields of the rules that need this one, in the order of the spec."""
    rules = [rule.needs for rule in RULES.rules]
    rules += [tuple(f"model.{need}" for need in rule.needs) for rule in SHAPE_RULES.rules]
    others = {need for needs in rules if path in needs for need in needs if need != path}
    return [each for each in known_paths() if each in others]


def as_markdown() -> str:
    """Return the page of all fields, docs/spec.md."""
    lines = [
        "# The fields of a run spec",
        "",
        "Written by `trimaran fields --markdown`; `trimaran fields SECTION` shows the same on the terminal. A field is",
        "left out where its default does. `NAME` stands for a name of your choice, `[N]` for each item of a list.",
    ]
    for name, description, _ in sections():
        lines += ["", f"## {name}", "", description, "", "| field | type | default | rule | |", "|---|---|---|---|---|"]
        lines += [
            "| " + " | ".join([f"`{each.path}`", each.kind, in_code(each.default), each.rule, each.description]) + " |"
            for each in fields_in(name)
        ]
    return "\n".join(line.replace("<", "&lt;") for line in lines) + "\n"


def in_code(default: str) -> str:
    """Return a default as a page shows it."""
    return default if default == "required" else f"`{default}`"
