"""SpecError: every error of a run spec, in sentences for the person who wrote it."""

from collections.abc import Sequence
from typing import Final

from trimaran.models.fields import FieldError

__all__ = ["FieldError", "SpecError", "show"]

MOST_SHOWN: Final = 20
"""Errors that are printed; of further ones the count."""
MOST_WORD: Final = 60
"""Characters of a value that are printed."""


def show(value: object) -> str:
    """Return a value as it would stand in the YAML file, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= MOST_WORD else f"{text[: MOST_WORD - 3]}..."


class SpecError(ValueError):
    """A run spec that breaks one rule or more; `errors` has all of them, `str()` shows the first to a person.

    Args:
        errors: every broken rule, at least one.
        source: where the spec came from, for the headline.
    """

    def __init__(self, errors: Sequence[FieldError], source: str = "the run spec") -> None:
        self.errors: list[FieldError] = list(errors)
        self.source = source
        super().__init__(self.errors, source)

    def __str__(self) -> str:
        count = f"{len(self.errors):,} error" + ("" if len(self.errors) == 1 else "s")
        lines = [f"  {error}" for error in self.errors[:MOST_SHOWN]]
        if len(self.errors) > MOST_SHOWN:
            lines.append(f"  and {len(self.errors) - MOST_SHOWN:,} more")
        return "\n".join([f"{count} in {self.source}:", *lines])
