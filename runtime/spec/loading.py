"""Run specs on disk: reading a YAML file with overrides, and writing one back."""

import errno
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from trimaran.runtime.files import read_bytes
from trimaran.runtime.spec.errors import FieldError, SpecError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.names import name_of_today, section_of, with_new_names
from trimaran.runtime.spec.parsing import Reading, build_spec, unknown_field
from trimaran.runtime.spec.run import RunSpec
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
    """
    source = str(path)
    document = read_yaml(_read_text(Path(path), source), source)
    if document.errors:
        raise SpecError(document.errors, source)
    if not isinstance(document.value, dict) or not document.value:
        got = "an empty file" if document.value in (None, {}) else type(document.value).__name__
        fix = f"write sections with fields below them: {', '.join(RunFields.model_fields)}"
        raise SpecError([FieldError(source, f"must be a mapping of sections, got {got}", document.value, fix)], source)
    raw: dict[str, Any] = {str(name): value for name, value in document.value.items()}
    raw = with_new_names(raw, document.lines)  # before the overrides, which are above former names too
    reading = Reading(lines=document.lines)
    for text in overrides:
        _override(raw, text, reading)
    train = raw.setdefault("train", {})
    if isinstance(train, dict):
        raw["train"] = {"output_dir": f"runs/{Path(path).stem}", **train}
    spec = build_spec(raw, reading, source)
    # The ranks read what the run folder will hold: every field, each item on a line of its own.
    if len(dump_spec(spec).encode()) > MOST_BYTES:
        rule = f"has more than {MOST_BYTES >> 10} KiB with every field written out"
        raise SpecError([FieldError(source, rule, None, SHORTER)], source)
    return spec


def dump_spec(spec: RunFields) -> str:
    """Return the run as YAML with every field written out; reading it back gives an equal spec."""
    return write_yaml(spec.model_dump())


def _read_text(path: Path, source: str) -> str:
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            [FieldError(source, f"is not UTF-8 text (byte {error.start})", None, "save it as UTF-8")], source
        ) from error
    except OSError as error:
        fix = SHORTER if error.errno == errno.EFBIG else "give the path of a YAML run spec"
        rule = f"cannot be read: {error.strerror or error}"
        raise SpecError([FieldError(source, rule, None, fix)], source) from error


def _override(raw: dict[str, Any], text: str, reading: Reading) -> None:
    """Put one `section.field=value` into `raw`, or add its error to `reading`."""
    path, equals, value_text = text.partition("=")
    path = path.strip()
    if not equals or not path:
        rule = f"{text!r} is not FIELD=VALUE"
        reading.add([FieldError("--set", rule, text, "write it like --set parallel.tp=4, without spaces around =")])
        return
    parsed = read_yaml(value_text, f"--set {path}")
    if parsed.errors:
        reading.add([replace(error, line=None) for error in parsed.errors])
        return
    # What is reported about this path is no longer about the line in the file.
    reading.lines.pop(path, None)
    section, _, name = path.rpartition(".")
    if "." in section or name_of_today(path):
        reading.add([unknown_field(path, parsed.value)])
    elif (known_section := section_of(path)) is not None:
        fix = f"set one field at a time, such as --set {path}.{next(iter(known_section.model_fields))}=..."
        reading.add([FieldError(path, "is a section, not a field", parsed.value, fix)])
    else:
        _put(raw, section, name, parsed.value)


def _put(raw: dict[str, Any], section: str, name: str, value: object) -> None:
    if not section:
        raw[name] = value
    elif raw.get(section) is None or isinstance(raw[section], dict):
        # A new mapping, because YAML aliases may share one between sections.
        raw[section] = {**(raw.get(section) or {}), name: value}
