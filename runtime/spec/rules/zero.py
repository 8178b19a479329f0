"""Rules of what the data-parallel ranks share out."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


@RULES.needs("zero.stage")
def _zero_stages_that_are_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    stage = spec.zero.stage
    if stage > 1:
        rule = f"must be 0 or 1, got {stage} (stages 2 and 3 are not built yet)"
        yield FieldError("zero.stage", rule, stage, "set zero.stage to 1")
