"""The rules that tie the fields of a run spec together.

A rule states the fields that it needs, reads them and yields FieldErrors; it never raises. On a draft (a spec without
its invalid fields) exactly those rules are skipped that need a missing field.
"""

from typing import Final

from pydantic import BaseModel

from trimaran.models.config import SHAPE_RULES
from trimaran.models.fields import FieldError
from trimaran.runtime.spec.fields import RunFields, draft_transformer
from trimaran.runtime.spec.rules import kernels, launcher, layout, pipeline, tokens, training, zero
from trimaran.runtime.spec.rules.launcher import check_world_size
from trimaran.runtime.spec.rules.table import Rules

__all__ = ["RULES", "broken_rules", "check_world_size"]

RULES: Final = Rules()
"""All rules but those of the shape alone, in the order in which they are reported."""
for _part in (layout, zero, tokens, pipeline, training, kernels, launcher):
    RULES.rules += _part.RULES.rules


def broken_rules(spec: RunFields) -> list[FieldError]:
    """Return every rule that `spec` breaks; it may be a draft, which lacks its invalid fields as attributes."""
    shape = draft_transformer(spec)
    sections = {**vars(spec), "model": shape}
    known = {f"{name}.{key}" for name, part in sections.items() if isinstance(part, BaseModel) for key in vars(part)}
    if hasattr(getattr(spec, "model", None), "preset"):
        known.add("model.preset")
    errors = [error.under("model") for error in SHAPE_RULES.broken(vars(shape), shape)]
    return errors + RULES.broken(known, spec, shape)
