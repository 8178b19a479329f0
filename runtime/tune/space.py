"""The space of a search: fields of the spec with their values or ranges, and the runs that they make. No torch.

A dimension has a coordinate: the number of one of its points, or a place in its range. Samplers see coordinates alone.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from trimaran.models.fields import FieldError, one_of
from trimaran.runtime.spec import RunSpec, SpecError
from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.loading import spec_with
from trimaran.runtime.spec.names import place_of
from trimaran.runtime.spec.parsing import unknown_field, wrong_value
from trimaran.runtime.spec.tree import is_within, step

Values: TypeAlias = Mapping[str, Any]
"""The values of a trial by key of the space."""

_OWN: Final = ("train.output_dir", "launcher", "slurm", "checkpoint.resume")
"""What the tuner itself decides."""
_RANGE: Final = ("low", "high", "log", "step", "when")
_CHOICE: Final = ("values", "when")
_MOST_POINTS: Final = 100_000
_DIGITS: Final = 12  # of a number that is a multiple of a step: 0.1 * 3 is 0.30000000000000004


@dataclass(frozen=True)
class Dimension:
    """Fields that get a value together.

    Args:
        key: the names of the fields, as the file has them.
        fields: their paths.
        choices: the values that they may have; of several fields each is a tuple. None for a range.
        low, high, log, step: of a range; with `log`, `step` is the factor between neighbours, and None is every number.
        is_whole: whether the range has whole numbers.
        when: keys of dimensions before this one, each with the values for which this one exists.
    """

    key: str
    fields: tuple[str, ...]
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    is_whole: bool = False
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def num_points(self) -> int | None:
        """How many values there are; None where the range is continuous."""
        if self.choices is not None:
            return len(self.choices)
        return None if self.step is None else math.floor(self.num_steps + 1e-9) + 1

    @property
    def num_steps(self) -> float:
        """How many steps lie between the ends of a range that has a step."""
        assert self.step is not None, f"{self.key} has a step"
        return math.log(self.high / self.low) / math.log(self.step) if self.log else (self.high - self.low) / self.step

    @property
    def is_ordered(self) -> bool:
        """Whether near coordinates are near values."""
        return self.choices is None

    def value_at(self, coordinate: float) -> Any:
        """Return the value at a coordinate: the number of a point, or a number of a continuous range."""
        if self.choices is not None:
            return self.choices[int(coordinate)]
        value = float(coordinate)
        if self.step is not None:
            value = self.low * self.step ** int(coordinate) if self.log else self.low + self.step * int(coordinate)
        value = min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)
        return round(value) if self.is_whole else value

    def coordinate_of(self, value: Any) -> float:
        """Return the coordinate of a value of this dimension."""
        if self.choices is not None:
            return next(
                number for number, each in enumerate(self.choices) if type(each) is type(value) and each == value
            )
        if self.step is None:
            return float(value)
        return round(math.log(value / self.low, self.step) if self.log else (value - self.low) / self.step)

    def coordinate_at(self, share: float) -> float:
        """Return the coordinate at a share in [0, 1) of the dimension; of a log range, a share of the logarithms."""
        if (count := self.num_points) is not None:
            return min(int(share * count), count - 1)
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def share_of(self, value: Any) -> float:
        """Return the share of the dimension at which a value lies, the middle of a point's."""
        coordinate, count = self.coordinate_of(value), self.num_points
        if count is not None:
            return (coordinate + 0.5) / count
        if self.log:
            return math.log(coordinate / self.low) / math.log(self.high / self.low)
        return (coordinate - self.low) / (self.high - self.low)

    def has(self, value: Any) -> bool:
        """Return whether a value is one of this dimension's."""
        if self.choices is not None:
            return any(type(each) is type(value) and each == value for each in self.choices)
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        return self.step is None or self.value_at(self.coordinate_of(value)) == value

    def exists(self, values: Values) -> bool:
        """Return whether this dimension has a value beside those of the ones before it."""
        return all(key in values and values[key] in wanted for key, wanted in self.when.items())

    def values_of_fields(self, value: Any) -> dict[str, Any]:
        """Return the value of each field."""
        return dict(zip(self.fields, value if len(self.fields) > 1 else (value,), strict=True))


@dataclass(frozen=True)
class Part:
    """A part of a study that is searched by itself: all of it, or one rung of a ladder.

    Args:
        rung: its name, None without a ladder.
        fixed: values of fields that all its trials have.
        trials: how many are started; None for every point of a grid.
        tokens: that every trial trains on: train.num_steps follows from its batch, and the steps of warmup, decay,
            evaluations and checkpoints are the same share of it as in the base. None: as the base says.
        follows: the rung whose best values the only trial of this part gets, None where it is searched.
    """

    rung: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None
    tokens: float | None = None
    follows: str | None = None


@dataclass(frozen=True)
class Space:
    """The dimensions of a search over the runs of a base spec.

    Args:
        base: the sections of the base spec, as its file has them.
        source: what its errors name.
    """

    dimensions: tuple[Dimension, ...]
    base: Mapping[str, Any]
    source: str

    def values_at(self, coordinates: Sequence[float]) -> dict[str, Any]:
        """Return the values at a coordinate of each dimension, of those that exist there."""
        values: dict[str, Any] = {}
        for dimension, coordinate in zip(self.dimensions, coordinates, strict=True):
            if dimension.exists(values):
                values[dimension.key] = dimension.value_at(coordinate)
        return values

    def holds(self, values: Values) -> bool:
        """Return whether these are values that the dimensions have together."""
        present: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.exists(present):
                if dimension.key not in values or not dimension.has(values[dimension.key]):
                    return False
                present[dimension.key] = values[dimension.key]
        return present.keys() == values.keys()

    def fields_of(self, values: Values) -> dict[str, Any]:
        """Return the value of each field that is searched, by its path."""
        found: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.key in values:
                found |= dimension.values_of_fields(_lists(values[dimension.key]))
        return found

    def spec_of(self, values: Values, part: Part, others: Mapping[str, Any]) -> RunSpec:
        """Return the run of a trial.

        Args:
            others: fields that the tuner decides.

        Raises:
            SpecError: the values break a rule.
        """
        fields = {**part.fixed, **self.fields_of(values), **others}
        spec = spec_with(self.base, fields, self.source)
        if part.tokens is not None and "train.num_steps" not in fields:
            steps = max(1, round(part.tokens / spec.tokens_per_step))
            fields = {**_in_proportion(spec, steps), **fields, "train.num_steps": steps}
            spec = spec_with(self.base, fields, self.source)
        samples = self._base_count("eval_batches", 4) * self._base_count("global_batch_size", 0)
        batch, batches = spec.train.global_batch_size, fields.get("train.eval_batches")
        if samples and batches is None and batch != self._base_count("global_batch_size", 0):
            # All trials are judged by the same samples, as far as whole batches go.
            same = {
                **fields,
                "train.num_steps": spec.train.num_steps,
                "train.eval_batches": max(1, round(samples / batch)),
            }
            spec = spec_with(self.base, same, self.source)
        return spec

    def _base_count(self, name: str, default: int) -> int:
        train = self.base.get("train")
        value = train.get(name, default) if isinstance(train, Mapping) else default
        return int(value) if isinstance(value, int | float) else 0


def _in_proportion(spec: RunSpec, num_steps: int) -> dict[str, Any]:
    """Return the fields that count or depend on steps as they are in a run of another length, none that is off."""
    share = num_steps / spec.train.num_steps
    counts = {
        "lr_schedule.warmup_steps": spec.lr_schedule.warmup_steps,
        "lr_schedule.decay_steps": spec.lr_schedule.decay_steps,
        "lr_schedule.step_interval": spec.lr_schedule.step_interval,
        "train.eval_interval": spec.train.eval_interval,
        "checkpoint.interval": spec.checkpoint.interval,
    }
    fields: dict[str, Any] = {path: max(1, round(count * share)) for path, count in counts.items() if count}
    if spec.lr_schedule.decay_rate is not None:
        fields["lr_schedule.decay_rate"] = spec.lr_schedule.decay_rate ** (1 / share)
    return fields


def _lists(value: Any) -> Any:
    """Return a value with lists for tuples, as YAML gives them."""
    if isinstance(value, tuple | list):
        return [_lists(each) for each in value]
    return value


def as_tuples(value: Any) -> Any:
    """Return a value with tuples for lists, also inside of others: values of trials are compared."""
    if isinstance(value, list | tuple):
        return tuple(as_tuples(each) for each in value)
    return value


def space_of(
    raw: Mapping[str, Any], base: Mapping[str, Any], source: str, *, is_grid: bool
) -> tuple[Space, list[FieldError]]:
    """Return the space that a file describes, and what is wrong with it.

    Args:
        base: see `Space`.
        is_grid: whether every dimension must have a number of points.
    """
    errors: list[FieldError] = []
    dimensions: dict[str, Dimension] = {}
    owners: dict[str, str] = {}
    for key, written in raw.items():
        path = step("space", key)
        found = list(_wrong_names(path, key, written, owners))
        if not found:
            fields = tuple(name.strip() for name in key.split(","))
            owners |= dict.fromkeys(fields, key)
            dimension = _read(path, key, fields, written, dimensions, found)
            if dimension is not None:
                if is_grid and dimension.num_points is None:
                    rule = "is a range without points, and search.sampler is grid"
                    found.append(FieldError(path, rule, written, "give it a step, or list the values"))
                dimensions[key] = dimension
        errors += found
    counts = [dimension.num_points for dimension in dimensions.values()]
    if is_grid and None not in counts and math.prod(filter(None, counts)) > _MOST_POINTS:
        rule = f"has {math.prod(filter(None, counts)):,} points, and a grid can have {_MOST_POINTS:,}"
        errors.append(FieldError("space", rule, None, "raise its steps, or take search.sampler random or qmc"))
    return Space(tuple(dimensions.values()), base, source), errors


def _wrong_names(path: str, key: str, written: object, owners: Mapping[str, str]) -> Iterator[FieldError]:
    names = [name.strip() for name in key.split(",")]
    if not all(names):
        rule = f"{show(key)} names an empty field"
        yield FieldError(path, rule, written, "write names of fields, with a comma between those that move together")
        return
    for name in dict.fromkeys(names):
        place = place_of(name)
        if place is None:
            suggestion = unknown_field(name, written).suggestion
            yield FieldError(path, f"{name!r} is no field of a run spec", written, suggestion)
        elif place.is_section and place.record:
            fix = f"name one of its fields, such as {name}.{next(iter(place.record.model_fields))}"
            yield FieldError(path, f"{name} is a section, not a field", written, fix)
        elif own := next((each for each in _OWN if is_within(name, each)), None):
            rule = f"{name} can't be searched, because the tuner decides {own}"
            yield FieldError(path, rule, written, "remove it; set it in the base spec if it is the same for all trials")
        elif name in owners or names.count(name) > 1:
            where = f", and in {owners[name]!r}" if name in owners and owners[name] != key else " twice"
            yield FieldError(path, f"{name} is given here{where}", written, "name every field once")


def _read(
    path: str,
    key: str,
    fields: tuple[str, ...],
    written: Any,
    before: Mapping[str, Dimension],
    errors: list[FieldError],
) -> Dimension | None:
    """Return a dimension, or None and what is wrong with it in `errors`."""
    if isinstance(written, list):
        written = {"values": written}
    if not isinstance(written, Mapping):
        form = "a list of values, or a range {low: ..., high: ...}"
        errors.append(
            FieldError(path, f"must be {form}, got {show(written)}", written, f"write it as [{show(written)}]")
        )
        return None
    names = _CHOICE if "values" in written else _RANGE
    for name in written:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            fix = f"did you mean {near[0]}?" if near else f"a range has {one_of(_RANGE)}, a list has {one_of(_CHOICE)}"
            errors.append(FieldError(step(path, str(name)), "unknown field", written[name], fix))
    when = _read_when(path, written.get("when"), before, errors)
    if "values" in written:
        choices = _read_choices(path, fields, written["values"], errors)
        return None if errors else Dimension(key, fields, choices, when=when)
    return _read_range(path, key, fields, written, when, errors)


def _read_choices(path: str, fields: tuple[str, ...], values: Any, errors: list[FieldError]) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        rule = f"must be a list with at least one value, got {show(values)}"
        errors.append(FieldError(path, rule, values, "list the values that are tried"))
        return ()
    for index, value in enumerate(values):
        where = step(path, index)
        together = value if isinstance(value, list) else [value]
        if len(fields) > 1 and len(together) != len(fields):
            rule = f"must have a value for each of the {len(fields)} fields, got {show(value)}"
            errors.append(FieldError(where, rule, value, f"write it as [{', '.join(fields)}] with their values"))
            continue
        for name, each in zip(fields, together if len(fields) > 1 else [value], strict=True):
            wrong = wrong_value(name, each)
            if wrong is not None:
                errors.append(FieldError(where, f"{name} {wrong.rule}", value, wrong.suggestion))
        if value in values[:index]:
            errors.append(FieldError(where, f"{show(value)} is listed twice", value, "list every value once"))
    return tuple(as_tuples(value) for value in values)


def _read_range(
    path: str,
    key: str,
    fields: tuple[str, ...],
    written: Mapping[str, Any],
    when: Mapping[str, tuple[Any, ...]],
    errors: list[FieldError],
) -> Dimension | None:
    place = place_of(fields[0])
    assert place is not None, f"{fields[0]} is a field"
    kinds = [each for each in place.choices if each in (int, float)]
    if len(fields) > 1 or not kinds:
        why = "several fields have no range together" if len(fields) > 1 else f"{key} is no number"
        errors.append(FieldError(path, f"is a range, and {why}", written, "list the values that are tried"))
        return None
    log, stride = written.get("log", False), written.get("step")
    if not isinstance(log, bool):
        errors.append(FieldError(f"{path}.log", f"must be true or false, got {show(log)}", log, "write log: true"))
    for name in ("low", "high", "step"):
        given = written.get(name)
        if name != "step" and given is None:
            rule = "is required, as the lower end" if name == "low" else "is required, as the upper end"
            errors.append(FieldError(f"{path}.{name}", rule, None, "write {low: ..., high: ...}, or a list of values"))
        elif given is not None and (type(given) not in (int, float) or not math.isfinite(given)):
            errors.append(FieldError(f"{path}.{name}", f"must be a number, got {show(given)}", given, "write a number"))
        elif given is not None and name != "step" and (wrong := wrong_value(key, given)):
            errors.append(FieldError(f"{path}.{name}", wrong.rule, given, wrong.suggestion))
    if errors:
        return None
    low, high = float(written["low"]), float(written["high"])
    is_whole = float not in kinds
    if low >= high:
        rule = f"must be below high, got low {show(written['low'])} and high {show(written['high'])}"
        errors.append(FieldError(f"{path}.low", rule, written["low"], "swap the two, or list the one value"))
    if log and low <= 0:
        rule = f"has no logarithm, got {show(written['low'])} with log: true"
        errors.append(FieldError(f"{path}.low", rule, written["low"], "set low above 0, or remove log"))
    least = 1 if log else 0
    if stride is not None and stride <= least:
        rule = f"must be above {least}, got {show(stride)}" + (", as the factor between neighbours" if log else "")
        errors.append(FieldError(f"{path}.step", rule, stride, f"write a step above {least}"))
    elif stride is not None and not errors and stride > (high / low if log else high - low):
        rule = f"is larger than the range, so that {show(written['low'])} alone would be tried, got {show(stride)}"
        errors.append(FieldError(f"{path}.step", rule, stride, "lower it, or list the values"))
    if errors:
        return None
    stride = float(stride) if stride is not None else 1.0 if is_whole and not log else None
    found = Dimension(key, fields, None, low, high, log, stride, is_whole, when)
    if written.get("step") is not None and found.num_steps > _MOST_POINTS:
        rule = f"makes {found.num_steps:,.0f} steps"
        errors.append(FieldError(f"{path}.step", rule, stride, f"raise it: at most {_MOST_POINTS:,}"))
        return None
    return found


def _read_when(
    path: str, written: Any, before: Mapping[str, Dimension], errors: list[FieldError]
) -> dict[str, tuple[Any, ...]]:
    """Return the conditions: of each dimension the values for which this one exists."""
    if written is None:
        return {}
    where = f"{path}.when"
    if not isinstance(written, Mapping) or not written:
        rule = f"must be a mapping of searched fields to values, got {show(written)}"
        errors.append(FieldError(where, rule, written, "write it as {FIELD: VALUE}"))
        return {}
    found = {}
    for key, wanted in written.items():
        here = step(where, str(key))
        dimension = before.get(str(key))
        if dimension is None:
            near = difflib.get_close_matches(str(key), before, n=1)
            fix = f"did you mean {near[0]}?" if near else "name a key of space that stands above this one"
            errors.append(FieldError(here, "is no key of space that stands above this one", wanted, fix))
            continue
        values = tuple(as_tuples(each) for each in (wanted if isinstance(wanted, list) else [wanted]))
        if dimension.choices is not None:
            for value in values:
                if value not in dimension.choices:
                    rule = f"{show(value)} is none of the values of {key}"
                    errors.append(FieldError(here, rule, value, f"they are {one_of(map(show, dimension.choices))}"))
        found[str(key)] = values
    return found


def rule_of(error: SpecError) -> str:
    """Return the rule that a combination breaks, its first, as it is counted."""
    first = error.errors[0]
    return f"{first.field} {first.rule}"
