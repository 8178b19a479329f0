"""RunSpec: the whole run, validated before any process starts."""

from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import model_validator

from trimaran.runtime.spec.errors import SpecError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules import broken_rules


class RunSpec(RunFields):
    """A run in which every field and every rule between fields holds.

    Read one with `load_spec` or `parse_spec`, which report all errors at once as a SpecError. Built directly, it raises
    pydantic's ValidationError, a ValueError too.
    """

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> Self:
        errors = broken_rules(self)
        if errors:
            raise SpecError(errors)
        return self


def fields_at_layout(spec: RunFields, **parallel: object) -> dict[str, Any]:
    """Return the fields of the run at another layout on this machine, without what only suits the layout it had.

    That are its nodes, the threads of its ranks, and how its dp ranks share out the training state.

    Args:
        parallel: the whole parallel section.
    """
    fields = spec.model_dump(mode="json")
    fields["launcher"] |= {"nodes": 1, "rendezvous": None, "threads_per_rank": None}
    return {**fields, "parallel": parallel, "zero": {}}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec file, for editors and other tools; the rules between fields are not in it."""
    schema = RunSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "trimaran run spec"}


def diff_specs(a: RunFields, b: RunFields) -> list[str]:
    """Return one line for every field that differs, as `parallel.tp: 2 -> 4`, in the order of the fields."""
    left, right = flat_fields(a.model_dump()), flat_fields(b.model_dump())
    # A record that may be absent (null) has other paths than one that is there.
    paths = dict.fromkeys([*left, *right])
    return [
        f"{path}: {_scalar(left.get(path))} -> {_scalar(right.get(path))}"
        for path in paths
        if left.get(path) != right.get(path)
    ]


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every field that is no record by its path, in order."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
