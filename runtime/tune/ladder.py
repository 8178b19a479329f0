"""The ladder: models of rising size, each searched by itself, and the target they lead to. No torch."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, one_of
from trimaran.runtime.plan.scaling.figures import INSTALL
from trimaran.runtime.spec import SpecError
from trimaran.runtime.spec.errors import show
from trimaran.runtime.tune.space import Part, Space
from trimaran.runtime.tune.transfer import carried_fields
from trimaran.runtime.tune.tune_spec import LadderSection, TuneSpec

FIELDS: Final = {"rate": "optimizer.lr", "batch": "train.global_batch_size"}
"""What may be fitted over the rungs -> the field of the spec."""
TARGET: Final = "target"
_FEWEST_RUNGS: Final = 3


@dataclass(frozen=True)
class Rung:
    """A model of the ladder, and the text that it is trained on.

    Attributes:
        fields: of the model section, by path.
        ratio: tokens for each parameter.
        flops_per_token: of training.
        layer_flops_per_token: of training, of the layers alone.
    """

    name: str
    fields: Mapping[str, Any]
    shape: TransformerConfig
    parameters: int
    parameters_without_embeddings: int
    ratio: float
    flops_per_token: float
    layer_flops_per_token: float

    @property
    def tokens(self) -> float:
        """Tokens that it is trained on, before they are rounded to whole steps."""
        return self.ratio * self.parameters


@dataclass(frozen=True)
class Ladder:
    """What a ladder asks for.

    Attributes:
        names: of what is varied: "rate", "batch".
        rungs: by size, those of one size by ratio.
        held_out: parameters of the rung that the first fit does not see, None for none.
        base_rung: where only one rung is searched and its best is carried to the others, its name.
    """

    names: tuple[str, ...]
    rungs: tuple[Rung, ...]
    target: Rung
    held_out: int | None
    base_rung: str | None

    def parts(self, trials: int | None) -> tuple[Part, ...]:
        """Return the parts of the study, one for each rung.

        Args:
            trials: of each rung that is searched; None for every point of a grid.
        """
        return tuple(
            Part(
                rung.name,
                rung.fields,
                1 if self._follows(rung) else trials,
                rung.tokens,
                self.base_rung if self._follows(rung) else None,
            )
            for rung in self.rungs
        )

    def _follows(self, rung: Rung) -> bool:
        return self.base_rung is not None and rung.name != self.base_rung


def ladder_of(tune: TuneSpec, space: Space) -> tuple[Ladder | None, list[FieldError]]:
    """Return the ladder of a search, None without one, and what is wrong with it."""
    if tune.ladder is None:
        return None, []
    section = tune.ladder
    errors = list(_wrong_settings(tune, section, space))
    rungs: list[Rung] = []
    for index, written in enumerate(section.rungs):
        for ratio in section.tokens_per_parameter:
            rung = _read_rung(f"ladder.rungs[{index}]", written, ratio, section, space, errors)
            if rung is None:
                break
            rungs.append(rung)
    target = _read_rung("ladder.target", section.target, section.tokens_per_parameter[0], section, space, errors)
    if errors or target is None:
        return None, errors
    rungs = _with_names(rungs)
    smallest = rungs[0]
    if section.transfer == "mup":
        carried = carried_fields(smallest.shape)
        rungs = [_measured(rung.name, {**rung.fields, **carried}, rung.ratio, space) for rung in rungs]
        target = _measured(TARGET, {**target.fields, **carried}, target.ratio, space)
    held_out = rungs[-1].parameters if section.held_out_rung == "largest" else None
    ladder = Ladder(
        tuple(section.vary), tuple(rungs), target, held_out, smallest.name if section.transfer == "mup" else None
    )
    return ladder, list(_wrong_rungs(section, ladder))


def _wrong_settings(tune: TuneSpec, section: LadderSection, space: Space) -> Iterator[FieldError]:
    keys = [dimension.key for dimension in space.dimensions]
    for name in section.vary:
        if FIELDS[name] not in keys:
            rest = [each for each in section.vary if FIELDS[each] in keys]
            fix = f"add {FIELDS[name]} to space" + (f", or set ladder.vary to {show(rest)}" if rest else "")
            yield FieldError("ladder.vary", f"names {name}, and space has no {FIELDS[name]}", section.vary, fix)
    for key in keys:
        if key not in [FIELDS[name] for name in section.vary]:
            allowed = one_of(FIELDS.values())
            rule = f"{key} is not fitted over the rungs of a ladder, which are {allowed} as ladder.vary names them"
            fix = "add its name to ladder.vary" if key in FIELDS.values() else "search it without ladder first"
            yield FieldError("space", rule, key, fix)
    if find_spec("scipy") is None:  # said now, not after the last trial
        yield FieldError("ladder", "needs the package scipy", None, INSTALL)
    ratios = section.tokens_per_parameter
    doubled = next((ratio for index, ratio in enumerate(ratios) if ratio in ratios[:index]), None)
    if doubled is not None:
        yield FieldError("ladder.tokens_per_parameter", f"names {doubled:g} twice", ratios, "name it once")
    if len(set(section.vary)) < len(section.vary):
        yield FieldError("ladder.vary", f"names {section.vary[0]} twice", section.vary, "name it once")
    if [each.metric for each in tune.objective] != ["held_out_loss"]:
        metrics = [each.metric for each in tune.objective]
        rule = f"must be held_out_loss alone with a ladder, whose laws are of the loss, got {', '.join(metrics)}"
        yield FieldError("objective", rule, metrics, "remove objective, or ladder")
    if section.transfer == "mup" and section.vary != ["rate"]:
        rule = "is rate alone with transfer mup: by theory a batch is not carried from one width to another"
        yield FieldError("ladder.vary", rule, section.vary, "set ladder.vary to [rate], or ladder.transfer to none")
    yield from _too_few_points(tune, section, space)


def _too_few_points(tune: TuneSpec, section: LadderSection, space: Space) -> Iterator[FieldError]:
    """Yield an error where a rung gets too few trials for a parabola and its interval."""
    needed = {1: 4, 2: 7}[max(1, len(section.vary))]
    points = [dimension.num_points for dimension in space.dimensions]
    most = math.prod(count for count in points if count is not None) if None not in points else None
    wanted = tune.search.trials
    found = min((count for count in (most, wanted) if count is not None), default=None)
    if found is not None and found < needed:
        rule = f"of {found} for each rung leave a parabola over {' and '.join(section.vary)} without an interval"
        where = "search.trials" if found == wanted else "space"
        yield FieldError(
            where, f"{'trials' if found == wanted else 'points'} {rule}", found, f"make it {needed} or more"
        )


def _wrong_rungs(section: LadderSection, ladder: Ladder) -> Iterator[FieldError]:
    sizes = sorted({rung.parameters for rung in ladder.rungs})
    if len(sizes) < len(section.rungs):
        doubled = [
            size
            for size in sizes
            if sum(rung.parameters == size for rung in ladder.rungs) > len(section.tokens_per_parameter)
        ]
        rule = f"has two models of {doubled[0]:,} parameters"
        yield FieldError("ladder.rungs", rule, section.rungs, "make every rung larger than the one before it")
    elif len(sizes) < _FEWEST_RUNGS:
        rule = f"has {len(sizes)} sizes, and a law over them needs {_FEWEST_RUNGS} or more for an interval"
        yield FieldError("ladder.rungs", rule, section.rungs, "add rungs; 5 also give the loss a law and a test")
    if ladder.base_rung is None:
        return
    base = ladder.rungs[0].shape
    for rung in (*ladder.rungs[1:], ladder.target):
        if rung.shape.num_layers != base.num_layers:
            rule = f"{rung.name} has {rung.shape.num_layers} layers and the base width {base.num_layers}"
            why = "transfer mup carries a rate over widths, not over depths"
            yield FieldError("ladder.rungs", f"{rule}; {why}", rung.shape.num_layers, "give all the same num_layers")
            return


def _read_rung(
    path: str,
    written: str | Mapping[str, Any],
    ratio: float,
    section: LadderSection,
    space: Space,
    errors: list[FieldError],
) -> Rung | None:
    """Return a rung or the target, or None and what is wrong with it in `errors`."""
    given: dict[str, Any] = {"preset": written} if isinstance(written, str) else dict(written)
    model = space.base.get("model")
    fields = {f"model.{name}": value for name, value in given.items()}
    if given.get("preset") is not None and isinstance(model, Mapping):
        # A preset is the whole shape: what the base spec says of its own model is not meant for it.
        fields = {f"model.{name}": None for name in model} | fields
    try:
        rung = _measured(TARGET, fields, ratio, space)
    except SpecError as error:
        errors += [FieldError(path, f"{each.field} {each.rule}", each.value, each.suggestion) for each in error.errors]
        return None
    if path == "ladder.target":
        return rung
    name = str(given["preset"]) if set(given) == {"preset"} else _short(rung.parameters)
    several = len(section.tokens_per_parameter) > 1
    return replace(rung, name=f"{name} x{ratio:g}" if several else name)


def _with_names(rungs: Sequence[Rung]) -> list[Rung]:
    """Return the rungs by size, each with a name of its own: near sizes get more digits."""
    ordered = sorted(rungs, key=lambda rung: (rung.parameters, rung.ratio))
    counts = Counter(rung.name for rung in ordered)
    return [
        rung if counts[rung.name] == 1 else replace(rung, name=rung.name.replace(_short(rung.parameters), exact, 1))
        for rung in ordered
        for exact in [f"{rung.parameters:,}"]
    ]


def _measured(name: str, fields: Mapping[str, Any], ratio: float, space: Space) -> Rung:
    """Return a rung with the sizes of its model. Raises SpecError."""
    middle = space.values_at([dimension.coordinate_at(0.5) for dimension in space.dimensions])
    spec = space.spec_of(middle, Part(fixed=fields), {})
    shape = spec.transformer
    return Rung(
        name,
        fields,
        shape,
        shape.num_parameters(),
        shape.num_parameters_without_embeddings(),
        ratio,
        shape.flops_per_token(spec.train.seq_len),
        3.0 * shape.num_layers * shape.layer_forward_flops(spec.train.seq_len),
    )


def _short(count: float) -> str:
    """Return a number of parameters as a name: 352K, 1.35M, 7B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"
