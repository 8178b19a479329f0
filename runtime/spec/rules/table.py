"""The table to which every file of rules adds its own."""

from typing import TypeAlias

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import RuleTable
from trimaran.runtime.spec.fields import RunFields

Rules: TypeAlias = RuleTable[[RunFields, TransformerConfig]]
"""Rules of a spec and its resolved shape. A need `model.x` is field x of the shape, except model.preset."""
