"""From plain mappings to a RunSpec, with every error at once.

Three passes feed one list of errors: unknown names, the fields one by one (pydantic), and the rules between fields.
When a field is wrong the rules still run, on a draft: the sections without their wrong fields.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from trimaran.runtime.spec.errors import MOST_SHOWN, FieldError, SpecError, show
from trimaran.runtime.spec.findings import Finding, describe_field, field_error, locate
from trimaran.runtime.spec.names import SPEC, name_of_today, nearest_path, place_of, with_new_names
from trimaran.runtime.spec.rules import broken_rules
from trimaran.runtime.spec.run import RunSpec
from trimaran.runtime.spec.tree import Place, above, is_given, is_within, name_in, parts_of, step, ways_to
from trimaran.runtime.spec.yaml_text import MOST_DEPTH


@dataclass
class Reading:
    """What reading a spec has found so far.

    Attributes:
        lines: line of the spec file for each path, counted from 1; None for what is not from the file.
        errors: every error found.
        unsure: paths whose value is not known, because it is wrong or stands under a wrong name.
    """

    lines: dict[str, int | None] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)

    def add(self, errors: Sequence[FieldError]) -> None:
        """Note the errors, with the line each field stands on."""
        self.errors += [replace(error, line=error.line or self._line(error.field)) for error in errors]

    def _line(self, path: str) -> int | None:
        """Return the line of a path; of a field that a record or list below a section lacks, the line of that one."""
        ways = islice(ways_to(path), MOST_DEPTH)  # --set may have a path of any length
        return next((self.lines[way] for way in ways if way in self.lines and (way == path or "." in way)), None)

    def rename(self, old: str, new: str) -> None:
        """Give the lines of what stands in `old` to the same in `new`."""
        self.lines |= {new + path[len(old) :]: line for path, line in self.lines.items() if is_within(path, old)}

    def forget(self, path: str) -> None:
        """Note that what stands in `path` is no longer what the file has there."""
        self.lines = {each: line for each, line in self.lines.items() if not is_within(each, path)} | {path: None}


def parse_spec(raw: Mapping[str, object]) -> RunSpec:
    """Return the run that the nested mapping describes.

    Raises:
        SpecError: it breaks a rule; the error holds all of them.
        TypeError: it is no mapping.
    """
    if not isinstance(raw, Mapping):
        raise TypeError(f"a spec must be a mapping of sections, such as {{'model': {{...}}}}; got {show(raw)}")
    return build_spec(raw, Reading(), "the run spec")


def build_spec(raw: Mapping[str, object], reading: Reading, source: str) -> RunSpec:
    """Return the run that `raw` describes; errors that `reading` already holds are reported with those found here.

    Raises:
        SpecError: anything is wrong.
    """
    given = with_new_names(raw, reading.lines)
    known = _known(given, SPEC, "", given, reading)
    try:
        spec = RunSpec.model_validate(known)
    except ValidationError as error:
        _collect(error, known, reading)
        doubtful = {"", *(way for path in reading.unsure for way in ways_to(path))}
        reading.add(broken_rules(_draft(SPEC, known, "", reading.unsure, doubtful)))
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
        return FieldError(
            path,
            f"is a former name of {today}",
            value,
            f"write {today} instead: {describe_field(place_of(today) or SPEC)}",
        )
    meant = nearest_path(path)
    if meant is not None:
        return FieldError(path, "unknown field", value, f"did you mean {meant}?")
    outer, holder = "", SPEC
    for part in parts_of(above(path)):
        inner = holder.inside(part)
        if inner is None:
            break
        outer, holder = step(outer, part), inner
    if holder.record is None:
        return FieldError(path, "unknown field", value, f"{outer} has no fields; set it as a whole")
    whose = f"the fields of {outer} are" if outer else "the sections are"
    return FieldError(path, "unknown field", value, f"{whose} {', '.join(holder.record.model_fields)}")


def wrong_value(path: str, value: object) -> FieldError | None:
    """Return why a field, by its path, can't have a value whatever the others have; None where it can."""
    place = place_of(path)
    assert place is not None, f"{path} is a field"
    try:
        _validated(place, value)
    except ValidationError as error:
        return field_error([Finding(path, place, False, detail) for detail in error.errors(include_url=False)])
    return None


def _known(value: Any, place: Place | None, path: str, raw: Mapping[str, object], reading: Reading) -> Any:
    """Return the value that stands at `path`, without unknown names, which are reported.

    A section that is absent and a record or mapping that is null are empty.
    """
    if value is None and place and place.holds_names and not place.is_optional:
        value = {}
    if place and place.record and isinstance(value, Mapping):
        return _known_in_record(value, place, path, raw, reading)
    if place and isinstance(value, Mapping):
        return {
            key: _known(item, place.inside(str(key)), step(path, str(key)), raw, reading) for key, item in value.items()
        }
    if place and isinstance(value, list):
        return [_known(item, place.inside(index), step(path, index), raw, reading) for index, item in enumerate(value)]
    return value


def _known_in_record(
    value: Mapping[Any, Any], place: Place, path: str, raw: Mapping[str, object], reading: Reading
) -> dict[str, Any]:
    assert place.record is not None, f"{path} is a record"
    fields, known = place.record.model_fields, {}
    for key, item in value.items():
        name, written = key, step(path, str(key))
        if name not in fields:
            meant = _report_unknown(written, item, raw, reading)
            name = name_in(meant)
            inner = place.inside(name) if above(meant) == path and name not in value else None
            if inner is None or not inner.holds_names or not isinstance(item, Mapping):
                continue
            # A misspelled record: what stands in it is checked as well, so that its errors come at once too.
            reading.unsure.discard(meant)
            reading.rename(written, meant)
        known[name] = _known(item, place.inside(name), step(path, name), raw, reading)
    for name in fields:
        if name not in known and place.under(name).is_section:
            known[name] = _known({}, place.under(name), step(path, name), raw, reading)
    return known


def _report_unknown(path: str, value: object, raw: Mapping[str, object], reading: Reading) -> str:
    """Report an unknown name; return the path that it was meant to be, or ""."""
    if len(reading.errors) >= MOST_SHOWN:  # a search takes half a millisecond, and nobody will see what it finds
        reading.add([FieldError(path, "unknown field", value)])
        return ""
    meant = nearest_path(path) or ""
    given = bool(meant) and is_given(raw, meant)
    reading.add([unknown_field(path, value, is_given=given)])
    if meant and not given:
        # What the writer wanted there is unknown: neither "is required" nor a rule over the default would help.
        reading.unsure.add(meant)
    return meant


def _collect(error: ValidationError, known: Mapping[str, Any], reading: Reading) -> None:
    """Note pydantic's findings; those about the types that one value may have are one error."""
    found: dict[tuple[str, int], list[Finding]] = {}
    for number, detail in enumerate(error.errors(include_url=False)):
        if isinstance(detail.get("ctx", {}).get("error"), SpecError):
            # The rules ran on the whole spec; they run again on the draft, which lacks the misspelled fields.
            continue
        finding = locate(detail, known)
        if finding is not None:
            found.setdefault((finding.path, -1 if finding.is_choice else number), []).append(finding)
    for (path, _), findings in found.items():
        if findings[0].detail["type"] == "missing" and reading.unsure.intersection(ways_to(path)):
            continue
        reading.unsure.add(path)
        reading.add([field_error(findings)])


def _draft(place: Place, value: Any, path: str, unsure: set[str], doubtful: Container[str]) -> Any:
    """Return a value as its type has it, records without the attributes that are not known; ... for one that is not.

    Args:
        unsure: paths whose value is not known.
        doubtful: these, and the paths of all that holds one of them.
    """
    if path not in doubtful:
        return _validated(place, value)
    if path in unsure:
        return ...
    if place.record and isinstance(value, Mapping):
        return _draft_record(place, value, path, unsure, doubtful)
    item = place.inside(0 if isinstance(value, list) else "NAME")
    if item is None or item.record is None or not isinstance(value, Mapping | list):
        return ...
    parts = {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else dict(enumerate(value))
    drafts = {part: _draft(item, each, step(path, part), unsure, doubtful) for part, each in parts.items()}
    # Of an item that is no record at all, that it is there is known.
    drafts = {part: _without_attributes(item.record) if each is ... else each for part, each in drafts.items()}
    return drafts if isinstance(value, Mapping) else list(drafts.values())


def _draft_record(
    place: Place, value: Mapping[str, Any], path: str, unsure: set[str], doubtful: Container[str]
) -> BaseModel:
    assert place.record is not None, f"{path} is a record"
    parts = {}
    for name in place.record.model_fields:
        if name in value:
            parts[name] = _draft(place.under(name), value[name], step(path, name), unsure, doubtful)
        elif step(path, name) in doubtful:
            parts[name] = ...
    draft = place.record.model_construct(**parts)
    for name, part in parts.items():
        if part is ...:
            del vars(draft)[name]
    return draft


def _without_attributes(record: type[BaseModel]) -> BaseModel:
    draft = record.model_construct()
    vars(draft).clear()
    return draft


def _validated(place: Place, value: Any) -> Any:
    if place.record and place.record is place.kind:
        return place.record.model_validate(value)
    kind: Any = place.kind
    if place.field and place.field.metadata and not place.is_item:
        # The metadata (ranges, conversions) belongs to the field and is not in its annotation.
        kind = Annotated[(kind, *place.field.metadata)]
    return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
