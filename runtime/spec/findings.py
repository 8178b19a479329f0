"""What pydantic finds in a field, in the words of this project."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic_core import ErrorDetails

from trimaran.models.fields import one_of
from trimaran.runtime.spec.errors import MOST_WORD, FieldError, show
from trimaran.runtime.spec.names import SPEC
from trimaran.runtime.spec.tree import Place, above, item_at, name_in, step

_KINDS: Final = MappingProxyType(
    {
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "finite_number": "a finite number",
    }
)
_TRUTH: Final = MappingProxyType(
    {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
)


@dataclass(frozen=True)
class Finding:
    """One finding of pydantic, and what it is about.

    Attributes:
        path: of what is wrong.
        place: what may stand there.
        is_choice: whether it is about one of several types that may stand there.
        detail: the finding.
    """

    path: str
    place: Place
    is_choice: bool
    detail: ErrorDetails


def locate(detail: ErrorDetails, known: Mapping[str, Any], record: Place | None = None) -> Finding | None:
    """Return a finding with its place; None where it is about a type that the value was not meant to be.

    Of a field with several types pydantic tries each, and names it in the location, as in ("data", "clean", "pii",
    "list[str]", 0).

    Args:
        known: what pydantic has read.
        record: the record that it has read it for; None for the spec.
    """
    path, place, value, is_choice = "", record or SPEC, known, False
    for part in detail["loc"]:
        if part == "[key]":
            break
        if len(place.choices) > 1 and not is_choice:
            if not _is_meant(str(part), place, value):
                return None
            is_choice = True
            continue
        value, part = item_at(value, part), part if isinstance(value, list) else str(part)
        path, place, is_choice = step(path, part), place.inside(part) or Place(Any), False
    return Finding(path, place, is_choice, detail)


def _is_meant(tag: str, place: Place, value: object) -> bool:
    """Return whether the type that pydantic calls `tag` is what a value was meant to be; each is where none fits."""
    if isinstance(value, Mapping) and (place.record or place.inside("NAME")):
        return (place.record.__name__ if place.record else "dict[") in tag
    if isinstance(value, list) and place.inside(0):
        return "list[" in tag or "tuple[" in tag
    return True


def field_error(findings: Sequence[Finding]) -> FieldError:
    """Return the findings about one value, one for each type that it may have, as one error."""
    path, detail = findings[0].path, findings[0].detail
    own_words = ("value_error", "model_type") if findings[0].place.is_switch else ("value_error",)
    best = next((each for each in findings if each.detail["type"] in own_words), None)
    rules, suggestions = zip(*map(_words, [best] if best else findings), strict=True)
    if len(rules) > 1:
        got = f", got {show(detail['input'])}"
        rule = " or ".join(each.removeprefix("must be ").removesuffix(got) for each in rules)
        rules = (f"must be {rule}{got}",)
    value = None if detail["type"] == "missing" else detail["input"]
    return FieldError(path, rules[0], value, ", or ".join(dict.fromkeys(suggestions)))


def describe_field(place: Place) -> str:
    """Return the description of the field at a place, as a part of a sentence."""
    words = str(place.field.description if place.field else "").rstrip(".")
    return words[:1].lower() + words[1:]


def _words(finding: Finding) -> tuple[str, str]:
    """Return the rule and the suggestion for one finding of pydantic."""
    path, place, detail = finding.path, finding.place, finding.detail
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    got = f", got {show(value)}"
    if kind == "missing":
        where = f" under {above(path)}" if above(path) else ""
        return "is required", f"write {name_in(path)}{where}: {describe_field(place)}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}{got}", _better_scalar(finding, value)
    if kind == "literal_error":
        return _choice(finding, value)
    if kind == "string_unicode":
        return "has half a surrogate pair, which is no character" + got, "write the character itself"
    if kind == "value_error":
        rule, _, suggestion = str(context["error"]).partition("; ")
        return rule, suggestion
    length = _length(place) if kind in ("list_type", "too_short", "too_long") else None
    if length is not None and place.field:
        return f"must be a list of {length} items{got}", f"write it as {place.field.default}"
    if kind == "too_short" and isinstance(value, Mapping):
        return "must have at least one name below it", f"write {describe_field(place)}"
    if kind in ("list_type", "too_short"):
        item = place.inside(0)
        kinds = (str, int, float) if item and float in item.choices else (str,)
        is_item = isinstance(value, kinds) and len(str(value)) < MOST_WORD
        least = int(context.get("min_length", 1))
        count = "one item" if least == 1 else f"{least} items"
        return f"must be a list with at least {count}{got}", f"write it as [{value if is_item else 'item, item'}]"
    if kind == "too_long":
        globs = "; name folders or globs instead of single files" if name_in(path) == "source" else ""
        return f"must have at most {context['max_length']} items, got {len(value)}", f"write fewer{globs}"
    if kind in ("model_type", "dict_type"):
        return _names_below(finding, got)
    return _bound(finding, got)


def _names_below(finding: Finding, got: str) -> tuple[str, str]:
    """Return the words about a value where a record or a mapping must stand."""
    path, place = finding.path, finding.place
    item = place.inside("NAME") if place.record is None else None
    record = place.record or (item and item.record)
    fields = f": {', '.join(record.model_fields)}" if record else ""
    if item is not None:
        below = f"and below each its fields{fields}" if record else "each with its value"
        return f"must be a mapping of names{got}", f"write names below it, indented, {below}"
    if place.is_switch:
        return (
            f"must be true, false or a section with fields{got}",
            f"set {path} to true, or write fields below it{fields}",
        )
    rule, name = f"must be a section with fields{got}", name_in(path)
    if record and name in record.model_fields:
        return rule, f"write {name} below a name of your choice, as {above(path)}.NAME.{name}"
    return rule, f"write its fields below it, indented{fields}"


def _better_scalar(finding: Finding, value: object) -> str:
    """Return what to write instead of a value of the wrong type."""
    path, kind = finding.path, finding.detail["type"]
    if value is None:
        return f"write a value: {describe_field(finding.place)}"
    if kind == "string_type" and isinstance(value, dict):
        return f"set {path} to text, in quotes where it has a colon"
    if isinstance(value, str) and kind != "bool_type" and _is_number(value):
        return "write it without quotes"
    if kind == "bool_type":
        return f"set {path} to {_TRUTH.get(str(value).lower(), 'true or false')}"
    if kind == "string_type":
        return f'write it in quotes: "{value}"' if isinstance(value, bool | int | float) else f"set {path} to text"
    if kind == "int_type" and isinstance(value, float) and math.isfinite(value):
        return f"set {path} to {math.floor(value)} or {math.ceil(value)}"
    default = _default(finding.place)
    return f"set {path} to {_KINDS[kind]}" + (f", such as {default}" if default else "")


def _choice(finding: Finding, value: object) -> tuple[str, str]:
    options = list(_options(finding.place.kind))
    rule = f"must be {one_of(options)}, got {show(value)}"
    word = str(value).lower()
    nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.4)
    # Three letters of which two agree, as of tpu and cpu, say little.
    likely = nearest and (len(word) > 3 or nearest[0].startswith(word))
    return rule, f"did you mean {nearest[0]}?" if likely else f"set {finding.path} to {one_of(options)}"


def _bound(finding: Finding, got: str) -> tuple[str, str]:
    path, place, detail = finding.path, finding.place, finding.detail
    for key, words, whole_number_step in (
        ("ge", "at least", 0),
        ("gt", "above", 1),
        ("le", "at most", 0),
        ("lt", "below", -1),
    ):
        limit = detail.get("ctx", {}).get(key)
        if limit is not None:
            side = "more" if key in ("ge", "gt") else "less"
            if isinstance(detail["input"], int) and isinstance(limit, int):
                return f"must be {words} {limit}{got}", f"set {path} to {limit + whole_number_step} or {side}"
            default = _default(place)
            limit = f"{limit:g}"
            return f"must be {words} {limit}{got}", f"set {path} to a number {words} {limit}" + (
                f", such as {default}" if default else ""
            )
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{got}", f"see its description: {describe_field(place)}"


def _default(place: Place) -> str | None:
    default = place.field.default if place.field and not place.is_item else None
    return show(default) if isinstance(default, bool | int | float) else None


def _length(place: Place) -> int | None:
    """Return how many items the list of a field has, None where that is free."""
    metadata = place.field.metadata if place.field and not place.is_item else ()
    least, most = (
        next((getattr(each, name) for each in metadata if hasattr(each, name)), None)
        for name in ("min_length", "max_length")
    )
    return least if least == most else None


def _options(kind: Any) -> Iterator[str]:
    """Yield the choices of a Literal, which may be one of several types."""
    for argument in getattr(kind, "__args__", ()):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _options(argument)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
