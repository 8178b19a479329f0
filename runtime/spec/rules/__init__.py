"""The rules that tie the fields of a run spec together.

A rule states the fields that it needs, reads them and yields FieldErrors; it never raises. On a draft (a spec without
its invalid fields) exactly those rules are skipped that need a missing field. In records below a section each field is
a need of its own, that of every item as `data.corpora.NAME.weight`.
"""

from typing import Final

from trimaran.models.fields import FieldError
from trimaran.models.shape.rules import SHAPE_RULES
from trimaran.runtime.spec.fields import RunFields, draft_transformer
from trimaran.runtime.spec.names import known_paths
from trimaran.runtime.spec.rules import (
    adapter,
    data,
    finetune,
    finetune_rl,
    kernels,
    launcher,
    layout,
    pipeline,
    preference,
    tokens,
    training,
    zero,
)
from trimaran.runtime.spec.rules.launcher import check_world_size
from trimaran.runtime.spec.rules.table import Rules
from trimaran.runtime.spec.tree import is_within, lacking_paths

__all__ = ["RULES", "broken_rules", "check_world_size"]

RULES: Final = Rules()
"""All rules but those of the shape alone, in the order in which they are reported."""
for _part in (
    *(layout, zero, data, tokens, pipeline, training),
    *(finetune, finetune_rl, preference, adapter),
    *(kernels, launcher),
):
    RULES.rules += _part.RULES.rules


def broken_rules(spec: RunFields) -> list[FieldError]:
    """Return every rule that `spec` breaks; it may be a draft, which lacks its invalid fields as attributes."""
    shape = draft_transformer(spec)
    lacking = [path for path in lacking_paths(spec) if path == "model" or not path.startswith("model.")]
    lacking += lacking_paths(shape, "model")
    if not hasattr(getattr(spec, "model", None), "preset"):
        lacking.append("model.preset")
    known = {path for path in known_paths() if not any(is_within(path, each) for each in lacking)}
    whole = {name for name in vars(shape) if not any(is_within(each, f"model.{name}") for each in lacking)}
    errors = [error.under("model") for error in SHAPE_RULES.broken(whole, shape)]
    return errors + RULES.broken(known, spec, shape)
