"""From plain mappings to a RunSpec, with every error at once.

Three passes feed one list of errors: unknown names, the fields one by one (pydantic), and the rules between fields.
When a field is wrong the rules still run, on a draft: the sections without their wrong fields.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from trimaran.models.fields import one_of
from trimaran.runtime.spec.errors import MOST_SHOWN, MOST_WORD, FieldError, SpecError, show
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.names import name_of_today, nearest_path, section_of, with_new_names
from trimaran.runtime.spec.rules import broken_rules
from trimaran.runtime.spec.run import RunSpec

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


@dataclass
class Reading:
    """What reading a spec has found so far.

    Attributes:
        lines: line of the spec file for each path, counted from 1.
        errors: every error found.
        unsure: paths whose value is not known, because it is wrong or stands under a wrong name.
    """

    lines: dict[str, int] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)

    def add(self, errors: Sequence[FieldError]) -> None:
        """Note the errors, with the line each field stands on."""
        self.errors += [
            replace(error, line=error.line or self.lines.get(error.field.partition("[")[0])) for error in errors
        ]


def parse_spec(raw: Mapping[str, object]) -> RunSpec:
    """Return the run that the nested mapping describes.

    Raises:
        SpecError: it breaks a rule; the error holds all of them.
    """
    return build_spec(raw, Reading(), "the run spec")


def build_spec(raw: Mapping[str, object], reading: Reading, source: str) -> RunSpec:
    """Return the run that `raw` describes; errors that `reading` already holds are reported with those found here.

    Raises:
        SpecError: anything is wrong.
    """
    known = _known_fields(with_new_names(raw, reading.lines), reading)
    try:
        spec = RunSpec.model_validate(known)
    except ValidationError as error:
        _collect(error, reading)
        reading.add(broken_rules(_draft(known, reading)))
    else:
        if not reading.errors:
            return spec
        # The rules held only with defaults in place of misspelled fields, which is why they are not run again.
    raise SpecError(reading.errors, source) from None


def unknown_field(path: str, value: object, *, is_given: bool = False) -> FieldError:
    """Return the error about a name that no field has, with the name that was probably meant.

    Args:
        is_given: whether that one is given too.
    """
    today = name_of_today(path)
    if today is not None and is_given:
        rule = f"is a former name of {today}, which is given too"
        return FieldError(path, rule, value, f"remove {path}")
    if today is not None:
        return FieldError(path, f"is a former name of {today}", value, f"write {today} instead: {_description(today)}")
    meant = nearest_path(path)
    if meant is not None:
        return FieldError(path, "unknown field", value, f"did you mean {meant}?")
    section_name = path.rpartition(".")[0]
    section = section_of(section_name) or RunFields
    place = f"the fields of {section_name} are" if section is not RunFields else "the sections are"
    return FieldError(path, "unknown field", value, f"{place} {', '.join(section.model_fields)}")


def _known_fields(raw: Mapping[str, object], reading: Reading) -> dict[str, Any]:
    """Return `raw` with every section, absent ones as empty mappings, and without unknown names, which are reported."""
    known: dict[str, Any] = {}
    for written, value in raw.items():
        name = written
        if name not in RunFields.model_fields:
            name = _report_unknown(str(name), value, raw, reading)
            if name in raw or not section_of(name) or not isinstance(value, Mapping):
                continue
            # A misspelled section: what stands in it is checked as well, so that its errors come at once too.
            reading.unsure.discard(name)
            reading.lines |= {
                f"{name}.{key}": reading.lines[f"{written}.{key}"]
                for key in value
                if f"{written}.{key}" in reading.lines
            }
        known[name] = _known_in_section(name, value, raw, reading)
    for name in RunFields.model_fields:
        if section_of(name):
            known.setdefault(name, {})
    return known


def _known_in_section(name: str, value: object, raw: Mapping[str, object], reading: Reading) -> object:
    section = section_of(name)
    if section is None or not (value is None or isinstance(value, Mapping)):
        return value
    items: Mapping[str, object] = value or {}
    for key, item in items.items():
        if key not in section.model_fields:
            _report_unknown(f"{name}.{key}", item, raw, reading)
    return {key: item for key, item in items.items() if key in section.model_fields}


def _report_unknown(path: str, value: object, raw: Mapping[str, object], reading: Reading) -> str:
    """Report an unknown name; return the path that it was meant to be, or ""."""
    if len(reading.errors) >= MOST_SHOWN:  # a search takes half a millisecond, and nobody will see what it finds
        reading.add([FieldError(path, "unknown field", value)])
        return ""
    meant = nearest_path(path) or ""
    section, _, name = meant.partition(".")
    given = raw.get(section)
    is_given = isinstance(given, Mapping) and name in given
    reading.add([unknown_field(path, value, is_given=is_given)])
    if not is_given:
        # What the writer wanted there is unknown: neither "is required" nor a rule over the default would help.
        reading.unsure.add(meant)
    return meant


def _collect(error: ValidationError, reading: Reading) -> None:
    for detail in error.errors(include_url=False):
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, SpecError):
            # The rules ran on the whole spec; they run again on the draft, which lacks the misspelled fields.
            continue
        path = ".".join(str(part) for part in detail["loc"][:2])
        if detail["type"] == "missing" and {path, path.partition(".")[0]} & reading.unsure:
            continue
        reading.unsure.add(path)
        reading.add([_field_error(path, detail)])


def _draft(known: Mapping[str, Any], reading: Reading) -> RunFields:
    """Return the fields that are valid, as attributes; those that are not are missing attributes."""
    parts: dict[str, Any] = {}
    for name in RunFields.model_fields:
        section = section_of(name)
        if section and isinstance(known[name], Mapping) and name not in reading.unsure:
            bad = {path.partition(".")[2] for path in reading.unsure if path.partition(".")[0] == name}
            parts[name] = _draft_section(section, known[name], bad)
    draft = RunFields.model_construct(**parts)
    for name in RunFields.model_fields:
        if section_of(name) and name not in parts:
            vars(draft).pop(name, None)
    return draft


def _draft_section(section: type[BaseModel], known: Mapping[str, Any], bad: set[str]) -> BaseModel:
    values = {}
    for name, value in known.items():
        if name not in bad:
            info = section.model_fields[name]
            # The metadata (ranges, conversions) belongs to the field and is not in its annotation.
            kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            values[name] = TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    draft = section.model_construct(**values)
    for name in bad:
        vars(draft).pop(name, None)
    return draft


def _field_error(path: str, detail: ErrorDetails) -> FieldError:
    """Return pydantic's finding in the words of this project."""
    value = detail["input"]
    inside = "".join(f"[{part}]" for part in detail["loc"][2:])
    rule, suggestion = _words(path, detail)
    suggestion = suggestion.replace(f"set {path} ", f"set {path}{inside} ")
    return FieldError(path + inside, rule, None if detail["type"] == "missing" else value, suggestion)


def _words(path: str, detail: ErrorDetails) -> tuple[str, str]:
    """Return the rule and the suggestion for one finding of pydantic."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    got = f", got {show(value)}"
    if kind == "missing":
        place, _, name = path.rpartition(".")
        return "is required", f"write {name} under {place}: {_description(path)}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}{got}", _better_scalar(path, kind, value)
    if kind == "literal_error":
        return _choice(path, value)
    if kind == "string_unicode":
        return "has half a surrogate pair, which is no character" + got, "write the character itself"
    if kind == "value_error":
        rule, _, suggestion = str(context["error"]).partition("; ")
        return rule, suggestion
    length = _length(path) if kind in ("list_type", "too_short", "too_long") else None
    if length is not None:
        return f"must be a list of {length} items{got}", f"write it as {_field_info(path).default}"
    if kind in ("list_type", "too_short"):
        example = f"[{value}]" if isinstance(value, str) and len(value) < MOST_WORD else "[item, item]"
        return "must be a list with at least one item" + got, f"write it as {example}"
    if kind == "too_long":
        globs = "; name folders or globs instead of single files" if path == "data.source" else ""
        return f"must have at most {context['max_length']} items, got {len(value)}", f"write fewer{globs}"
    if kind == "model_type":
        section = section_of(path) or RunFields
        return (
            "must be a section with fields" + got,
            f"write its fields below it, indented: {', '.join(section.model_fields)}",
        )
    return _bound(path, detail, got)


def _better_scalar(path: str, kind: str, value: object) -> str:
    """Return what to write instead of a value of the wrong type."""
    if value is None:
        return f"write a value: {_description(path)}"
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
    default = _default(path)
    return f"set {path} to {_KINDS[kind]}" + (f", such as {default}" if default else "")


def _choice(path: str, value: object) -> tuple[str, str]:
    options = list(_options(path))
    rule = f"must be {one_of(options)}, got {show(value)}"
    word = str(value).lower()
    nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.4)
    # Three letters of which two agree, as of tpu and cpu, say little.
    likely = nearest and (len(word) > 3 or nearest[0].startswith(word))
    return rule, f"did you mean {nearest[0]}?" if likely else f"set {path} to {one_of(options)}"


def _bound(path: str, detail: ErrorDetails, got: str) -> tuple[str, str]:
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
            default = _default(path)
            limit = f"{limit:g}"
            return f"must be {words} {limit}{got}", f"set {path} to a number {words} {limit}" + (
                f", such as {default}" if default else ""
            )
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{got}", f"see its description: {_description(path)}"


def _field_info(path: str) -> Any:
    section, _, name = path.rpartition(".")
    return (section_of(section) or RunFields).model_fields[name]


def _description(path: str) -> str:
    words = str(_field_info(path).description).rstrip(".")
    return words[0].lower() + words[1:]


def _default(path: str) -> str | None:
    default = _field_info(path).default
    return show(default) if isinstance(default, bool | int | float) else None


def _length(path: str) -> int | None:
    """Return how many items the list of a field has, None where that is free."""
    least, most = (
        next((getattr(each, name) for each in _field_info(path).metadata if hasattr(each, name)), None)
        for name in ("min_length", "max_length")
    )
    return least if least == most else None


def _options(path: str) -> Iterator[str]:
    """Yield the choices of a Literal field, which may be wrapped in an optional."""
    kinds = [_field_info(path).annotation]
    for kind in kinds:
        for argument in getattr(kind, "__args__", ()):
            if isinstance(argument, str):
                yield argument
            else:
                kinds.append(argument)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
