"""Run specs on disk: reading a YAML file with overrides, and writing one back."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from trimaran.runtime.files import read_bytes
from trimaran.runtime.spec.errors import FieldError, SpecError, show
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.names import SPEC, name_of_today, place_of, with_new_names
from trimaran.runtime.spec.parsing import Reading, build_spec, unknown_field
from trimaran.runtime.spec.run import RunSpec
from trimaran.runtime.spec.tree import Part, Place, above, item_at, parts_of
from trimaran.runtime.spec.yaml_text import MOST_BYTES, SHORTER, read_yaml, write_yaml


def load_spec(path: str | PathLike[str], overrides: Sequence[str] = ()) -> RunSpec:
    """Return the run that a YAML file describes.

    A file that names no train.output_dir writes to runs/NAME, after its own name.

    Args:
        path: the spec file, UTF-8.
        overrides: changes on top of it, each `section.field=value` with the value in YAML, such as `parallel.tp=4`.

    Raises:
        SpecError: the file is missing or not YAML, an override names no field, or the run breaks a rule; holds all
            errors.
        TypeError: the overrides are no list of texts.
    """
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise TypeError(f"overrides must be a list of texts such as ['parallel.tp=4']; got {show(overrides)}")
    source = str(path)
    raw, reading = read_raw(path)
    for text in overrides:
        raw = _override(raw, text, reading)
    train = raw.setdefault("train", {})
    if isinstance(train, dict):
        raw["train"] = {"output_dir": f"runs/{Path(path).stem}", **train}
    spec = build_spec(raw, reading, source)
    # The ranks read what the run folder will hold: every field, each item on a line of its own.
    if len(dump_spec(spec).encode()) > MOST_BYTES:
        rule = f"has more than {MOST_BYTES >> 10} KiB with every field written out"
        raise SpecError([FieldError(source, rule, None, SHORTER)], source)
    return spec


def read_raw(path: str | PathLike[str]) -> tuple[dict[str, Any], Reading]:
    """Return the mapping of sections that a spec file holds, under the names of today and not checked yet.

    Raises:
        SpecError: the file is missing, not YAML, or no mapping.
    """
    source = str(path)
    document = read_yaml(read_file(Path(path), source), source)
    if document.errors:
        raise SpecError(document.errors, source)
    if not isinstance(document.value, dict) or not document.value:
        got = "an empty file" if document.value in (None, {}) else type(document.value).__name__
        fix = f"write sections with fields below them: {', '.join(RunFields.model_fields)}"
        raise SpecError([FieldError(source, f"must be a mapping of sections, got {got}", document.value, fix)], source)
    raw: dict[str, Any] = {str(name): value for name, value in document.value.items()}
    # Before the overrides, which are above former names too.
    return with_new_names(raw, document.lines), Reading(lines=document.lines)


def spec_with(raw: Mapping[str, Any], values: Mapping[str, object], source: str) -> RunSpec:
    """Return the run of a mapping of sections (`read_raw`) with the values of some fields, by path, in their place.

    Args:
        source: what the errors name.

    Raises:
        SpecError: as `load_spec`.
    """
    reading, changed = Reading(), dict(raw)
    for path, value in values.items():
        changed = _set(changed, path, value, reading)
    return build_spec(changed, reading, source)


def dump_spec(spec: RunFields) -> str:
    """Return the run as YAML with every field written out; reading it back gives an equal spec."""
    return write_yaml(spec.model_dump())


def read_file(path: Path, source: str, what: str = "run spec") -> str:
    """Return the text of a YAML file.

    Args:
        source: what the errors name.
        what: it should be, for errors.

    Raises:
        SpecError: it can't be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            [FieldError(source, f"is not UTF-8 text (byte {error.start})", None, "save it as UTF-8")], source
        ) from error
    except OSError as error:
        fix = SHORTER if error.errno == errno.EFBIG else f"give the path of a YAML {what}"
        rule = f"cannot be read: {error.strerror or error}"
        raise SpecError([FieldError(source, rule, None, fix)], source) from error


def _override(raw: dict[str, Any], text: str, reading: Reading) -> dict[str, Any]:
    """Return `raw` with one `section.field=value` put into it, or add its error to `reading`."""
    path, equals, value_text = text.partition("=")
    path = path.strip()
    if not equals or not path:
        rule = f"{text!r} is not FIELD=VALUE"
        reading.add([FieldError("--set", rule, text, "write it like --set parallel.tp=4, without spaces around =")])
        return raw
    parsed = read_yaml(value_text, f"--set {path}")
    if parsed.errors:
        reading.add([replace(error, line=None) for error in parsed.errors])
        return raw
    return _set(raw, path, parsed.value, reading)


def _set(raw: dict[str, Any], path: str, value: object, reading: Reading) -> dict[str, Any]:
    """Return `raw` with a value at a path, or add the path's error to `reading`."""
    # What is reported about this path is no longer about the line in the file.
    reading.forget(path)
    place, parts = place_of(path), parts_of(path)
    # A slip in the name of a section or of its field is found where those of a file are.
    is_found_later = len(parts) <= 2 or getattr(place_of(above(path)), "record", None)
    if name_of_today(path) or not (place or is_found_later):
        reading.add([unknown_field(path, value)])
    elif place and place.is_section and place.record:
        fix = f"set one field at a time, such as --set {path}.{next(iter(place.record.model_fields))}=..."
        reading.add([FieldError(path, "is a section, not a field", value, fix)])
    else:
        try:
            raw = _with(raw, SPEC, parts, value)
        except LookupError:
            rule = "names an item that its list does not have"
            reading.add([FieldError(path, rule, value, "count its items from 0, or set the whole list")])
    return raw


def _with(value: Any, place: Place | None, parts: Sequence[Part], new: object) -> Any:
    """Return a copy of `value` with `new` at these steps: a copy, because YAML aliases may share what it holds.

    A record that is null, or true or false in place of its fields, is made; null takes a name out of a mapping. What is
    wrong on the way stays, to be reported.

    Raises:
        LookupError: a list has no such item.
    """
    if not parts:
        return new
    part, inner = parts[0], place and place.inside(parts[0])
    held = item_at(value, part)
    if isinstance(part, int):
        if held is ...:
            raise LookupError
        return [*value[:part], _with(held, inner, parts[1:], new), *value[part + 1 :]]
    if value is None or (isinstance(value, bool) and place and place.is_switch):
        value = {}
    if not isinstance(value, dict):
        return value
    if new is None and len(parts) == 1 and inner and inner.is_item:
        return {name: each for name, each in value.items() if name != part}
    return {**value, part: _with(None if held is ... else held, inner, parts[1:], new)}
