"""What validated records are made of: number types, derived defaults, errors and rules between fields. No torch."""

import inspect
import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Generic, ParamSpec

from pydantic import BeforeValidator, Field

P = ParamSpec("P")


@dataclass(frozen=True)
class FieldError:
    """One broken rule: the field, the rule, the value that broke it, and the values that obey it."""

    field: str
    rule: str
    value: object
    suggestion: str = ""
    line: int | None = None  # line of the spec file, counted from 1, where there is one

    def __str__(self) -> str:
        place = self.field if self.line is None else f"{self.field} (line {self.line})"
        text = f"{place}: {self.rule}" + (f"; {self.suggestion}" if self.suggestion else "")
        return printable(text)

    def under(self, section: str) -> "FieldError":
        """Return the same error with its field path placed under `section`."""
        return replace(self, field=f"{section}.{self.field}")


class Derived:
    """A default_factory of pydantic: the default of a field that follows from fields declared before it.

    Args:
        function: returns the default; its parameters are named after the fields that it reads.
        words: the default in words.
    """

    def __init__(self, function: Callable[..., Any], words: str) -> None:
        self.function, self.words = function, words
        self.sources = tuple(inspect.signature(function).parameters)

    def __call__(self, values: dict[str, Any]) -> Any:
        """Return the default for these values of the fields before it, all of them valid."""
        return self.function(*(values[source] for source in self.sources))


@dataclass(frozen=True)
class Rule(Generic[P]):
    """One rule between fields.

    Args:
        check: yields an error for everything that breaks the rule.
        needs: the fields that `check` reads; without one of them the rule can't be judged.
        may_read: fields that `check` reads where they are known.
    """

    check: Callable[P, Iterator[FieldError]]
    needs: tuple[str, ...]
    may_read: tuple[str, ...]


class RuleTable(Generic[P]):
    """Rules in the order in which they are reported; each is a function decorated by `needs`."""

    def __init__(self) -> None:
        self.rules: list[Rule[P]] = []

    def needs(
        self, *needs: str, may_read: tuple[str, ...] = ()
    ) -> Callable[[Callable[P, Iterator[FieldError]]], Callable[P, Iterator[FieldError]]]:
        """Return a decorator that adds a check to the table; see `Rule` for the arguments."""

        def add(check: Callable[P, Iterator[FieldError]]) -> Callable[P, Iterator[FieldError]]:
            self.rules.append(Rule(check, needs, may_read))
            return check

        return add

    def broken(self, known: Container[str], *args: P.args, **kwargs: P.kwargs) -> list[FieldError]:
        """Return the errors of every rule whose needs are all in `known`."""
        rules = [rule for rule in self.rules if all(name in known for name in rule.needs)]
        return [error for rule in rules for error in rule.check(*args, **kwargs)]


def printable(text: str, keep: str = "") -> str:
    """Return a text as it may stand on a terminal: control characters and bytes that are no UTF-8 as escapes.

    Args:
        keep: characters that stay as they are.
    """
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def counted(number: int, what: str, ending: str = "s") -> str:
    """Return a number with the noun that it counts: `1 rank`, `2,000 ranks`; `ending` is that of the plural."""
    return f"{number:,} {what}{'' if number == 1 else ending}"


def one_of(values: Iterable[object]) -> str:
    """Return the values as a person lists them: `1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest_divisors(number: int, wanted: int, count: int = 6) -> list[int]:
    """Return the `count` divisors of `number` that lie nearest to `wanted` (on a log scale), ascending."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    return sorted(sorted(divisors, key=lambda divisor: abs(math.log(divisor / max(wanted, 1))))[:count])


def at_most(largest: int, least: int = 1) -> str:
    """Return "4 or less" for a suggestion, and the number alone where it is the least that a field takes."""
    return f"{largest} or less" if largest > least else str(largest)


def nearest_multiples(step: int, wanted: int) -> list[int]:
    """Return the positive multiples of `step` around `wanted`: one, or the two on either side of it."""
    below = wanted // step * step
    return sorted({multiple for multiple in (below, below + step if below != wanted else below) if multiple > 0})


def _integral(value: object) -> object:
    # YAML gives 1e3 as a float; every other float is refused by the strict integer type behind this.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Stands last in an Annotated: it runs first, and the ranges before it reach the JSON schema.
INTEGRAL: Final = BeforeValidator(_integral)
# 31 bits: whatever is larger is a slip of the keyboard, and error messages factor these numbers.
Count = Annotated[int, Field(ge=1, le=2**31 - 1), INTEGRAL]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dropout = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegativeWhole = Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL]
