"""A record of an evaluation set, each of whose fields is checked: errors name file, line, field and value."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from trimaran.runtime.data.files import DataError

_SHOWN: Final = 80
_HALF_PAIR: Final = re.compile("[\ud800-\udfff]")
_NUMBERS: Final[Mapping[str, int]] = {"true": 1, "false": 0}


class Row:
    """A record.

    Args:
        place: file and line, for errors.
        wanted: the fields that the set takes, for errors.
    """

    def __init__(self, values: object, place: str, wanted: str) -> None:
        self.place, self._wanted = place, wanted
        if not isinstance(values, dict):
            raise DataError(f"{place} must be a record of fields, and it is {_shown(values)}; {wanted}")
        self._values: dict[str, Any] = values

    def has(self, *names: str) -> bool:
        """Whether the record has all these fields."""
        return self._values.keys() >= set(names)

    def get(self, name: str) -> Any:
        """Return the value of a field, whatever it is; DataError where the record has no such field."""
        if name not in self._values:
            has = ", ".join(map(str, self._values)) or "none"
            raise DataError(f"{self.place} has no field {name!r} (it has {has}); {self._wanted}")
        return self._values[name]

    def error(self, name: str, rule: str) -> DataError:
        """Return the error of a field whose value breaks a rule."""
        return DataError(f"{self.place}: {name} must be {rule}, and it is {_shown(self._values.get(name))}")

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """Return a text."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        if not value.strip() and not may_be_empty:
            raise self.error(name, "a text of at least one character that is no white space")
        if _HALF_PAIR.search(value):
            raise self.error(name, "a text without half a surrogate pair, which is no character")
        return value

    def texts(self, name: str, value: Any = None, *, least: int = 2, may_be_empty: bool = False) -> list[str]:
        """Return a list of texts; in a .csv file it is written as JSON.

        Args:
            value: the list, where it is not the field's value itself.
            may_be_empty: whether a text may be empty.
        """
        value = _unpacked(self.get(name) if value is None else value)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(each, str) for each in value):
            raise self.error(name, f"a list of at least {least} texts")
        if not may_be_empty and not all(each.strip() for each in value):
            raise self.error(name, "a list of texts none of which is empty: nothing would be scored")
        if any(map(_HALF_PAIR.search, value)):
            raise self.error(name, "a list of texts without half a surrogate pair, which is no character")
        return value

    def record(self, name: str) -> Any:
        """Return a record or a list of them; in a .csv file it is written as JSON."""
        return _unpacked(self.get(name))

    def index(self, name: str, below: int) -> int:
        """Return a whole number from 0 on, also one that is written as a text or as true or false."""
        value = self.get(name)
        if isinstance(value, str):
            text = value.strip().lower()
            value = int(text) if text.isdecimal() else _NUMBERS.get(text)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or not 0 <= value < below:
            raise self.error(name, f"a whole number from 0 to {below - 1}")
        return int(value)

    def among(self, name: str, values: Sequence[str] | Collection[str]) -> str:
        """Return a text that must be one of `values`."""
        value = self.get(name)
        text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else None
        if text is None or text not in values:
            raise self.error(name, f"one of {', '.join(values)}")
        return text


def _unpacked(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
