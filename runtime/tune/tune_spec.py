"""The record of a search, TUNE.yaml: what is varied, how it is searched, and what makes a trial good. No torch."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from trimaran.models.fields import INTEGRAL, Count, FieldError, NonNegativeWhole, Positive
from trimaran.runtime.spec import SpecError
from trimaran.runtime.spec.findings import field_error, locate
from trimaran.runtime.spec.loading import read_file
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Folder
from trimaran.runtime.spec.tree import Place, step
from trimaran.runtime.spec.yaml_text import read_yaml

_METRICS: Final = ("held_out_loss", "bits_per_byte", "tokens_per_second")
_DEFAULT_METRIC: Final = "held_out_loss"
_LOWER_IS_BETTER: Final = ("loss", "bits", "perplexity", "ppl")
Seed = Annotated[int, Field(ge=0, lt=2**31), INTEGRAL]
Factor = Annotated[int, Field(ge=2, le=100), INTEGRAL]


def _check_metric(text: str) -> str:
    if text in _METRICS or re.fullmatch(r"[^/\s]+(/[^/\s]+)+", text):
        return text
    near = difflib.get_close_matches(text, _METRICS, n=1)
    meant = f"did you mean {near[0]}?" if near else "write one of these, such as held_out_loss"
    raise ValueError(f"must be {', '.join(_METRICS)} or TASK/METRIC, got {text!r}; {meant}")


class SearchSection(BaseModel):
    """How values are proposed."""

    model_config = SECTION_CONFIG

    sampler: Literal["tpe", "random", "grid", "qmc", "cmaes"] = Field(
        default="tpe",
        description="tpe learns from finished trials which values are good, cmaes moves a normal distribution of the "
        "ranges towards them; random, qmc (a Sobol sequence) and grid don't look at results.",
    )
    trials: Count | None = Field(
        default=None, description="Trials that are started (null: grid alone, every one of its points)."
    )
    seed: Seed = Field(default=0, description="Seed of the proposals.")


class PruneSection(BaseModel):
    """When a trial that is worse than others is ended early, judged by its held-out losses while it trains."""

    model_config = SECTION_CONFIG

    method: Literal["none", "median", "hyperband"] = Field(
        default="none",
        description="median ends a trial that is worse than the median of the finished ones at the same step; "
        "hyperband goes on with the best of every factor trials at first_step, first_step * factor and so on.",
    )
    first_step: Count = Field(default=1, description="Step before which no trial is ended.")
    factor: Factor = Field(default=3, description="hyperband: of so many trials one goes on.")


class ObjectiveSection(BaseModel):
    """What makes a trial good."""

    model_config = SECTION_CONFIG

    metric: Annotated[str, AfterValidator(_check_metric)] = Field(
        default=_DEFAULT_METRIC,
        description="held_out_loss and bits_per_byte of the last evaluation, TASK/METRIC of the last evaluation of "
        "that task, or tokens_per_second.",
    )
    mode: Literal["min", "max"] | None = Field(
        default=None, description="Whether less or more is better (null: less of a loss, more of all others)."
    )

    @property
    def is_better_lower(self) -> bool:
        """Whether less is better."""
        if self.mode is not None:
            return self.mode == "min"
        return any(word in self.metric for word in _LOWER_IS_BETTER)


class LadderSection(BaseModel):
    """Searches at several sizes, from which the best values at a larger one are extrapolated."""

    model_config = SECTION_CONFIG

    rungs: Annotated[list[str | dict[str, Any]], Field(min_length=2, max_length=100)] = Field(
        description="Models of rising size: presets, or fields of the model section."
    )
    tokens_per_parameter: Annotated[list[Positive], Field(min_length=1, max_length=20)] = Field(
        default=[20.0], description="Trained tokens for each parameter; several tell model size from text apart."
    )
    vary: Annotated[list[Literal["rate", "batch"]], Field(min_length=1, max_length=2)] = Field(
        default=["rate", "batch"],
        description="What is fitted over the rungs: optimizer.lr and train.global_batch_size.",
    )
    target: str | dict[str, Any] = Field(description="The model to extrapolate to: a preset, or fields.")
    held_out_rung: Literal["largest", "none"] = Field(
        default="largest", description="The rung that the fit does not see and is tested on."
    )
    transfer: Literal["none", "mup"] = Field(
        default="none", description="mup searches at the smallest width and carries rate and initialization over."
    )


def _listed(value: object) -> object:
    return [value] if isinstance(value, Mapping) else value


class TuneSpec(BaseModel):
    """A search."""

    model_config = SECTION_CONFIG

    base: FilePath = Field(description="The run spec that the trials vary, a YAML file.")
    output_dir: Folder = Field(
        default="runs/tune", description="Folder of the study; a file without it writes to runs/NAME-OF-THE-FILE."
    )
    space: Annotated[dict[str, Any], Field(min_length=1)] = Field(
        description="Fields of the spec, each with a list of values or a range."
    )
    search: SearchSection = Field(default_factory=SearchSection, description="How values are proposed.")
    prune: PruneSection = Field(default_factory=PruneSection, description="When a trial is ended early.")
    objective: Annotated[list[ObjectiveSection], Field(min_length=1, max_length=2), BeforeValidator(_listed)] = Field(
        default_factory=lambda: [ObjectiveSection()], description="What makes a trial good; two give a Pareto front."
    )
    parallel_trials: Count = Field(default=1, description="Trials that run at once, of each tuner.")
    max_retries: NonNegativeWhole = Field(
        default=2, description="How often a trial that has crashed is started again without having saved meanwhile."
    )
    ladder: LadderSection | None = Field(default=None, description="Sizes to extrapolate from (null: no ladder).")


TUNE: Final = Place(TuneSpec)


def load_tune(path: Path) -> tuple[TuneSpec, dict[str, int | None]]:
    """Return the search that a YAML file describes, and the line of every path in it.

    Raises:
        SpecError: the file is missing, is not YAML or breaks a rule; holds all errors.
    """
    source = str(path)
    document = read_yaml(read_file(path, source, "search"), source)
    if document.errors:
        raise SpecError(document.errors, source)
    if not isinstance(document.value, dict) or not document.value:
        fix = f"write fields: {', '.join(TuneSpec.model_fields)}"
        raise SpecError([FieldError(source, "must be a mapping of fields", document.value, fix)], source)
    if "base" not in document.value and {"model", "train"} & document.value.keys():
        rule = "is a run spec, not a search"
        fix = f"write a file with base: {source} and the fields to search under space"
        raise SpecError([FieldError(source, rule, None, fix)], source)
    errors: list[FieldError] = []
    written = {**document.value, "objective": _sections(document.value.get("objective", _DEFAULT_METRIC))}
    raw = {"output_dir": f"runs/{path.stem}", **_known(written, TUNE, "", errors)}
    tune = None
    try:
        tune = TuneSpec.model_validate(raw)
    except ValidationError as error:
        found: dict[tuple[str, int], list[Any]] = {}
        for number, detail in enumerate(error.errors(include_url=False)):
            finding = locate(detail, raw, TUNE)
            if finding is not None:
                found.setdefault((finding.path, -1 if finding.is_choice else number), []).append(finding)
        errors += [_as_written(field_error(findings), document.value) for findings in found.values()]
    if tune is not None:
        errors += _broken_rules(tune)
    if errors or tune is None:
        raise with_lines(errors, document.lines, source)
    return tune, document.lines


def _sections(objective: object) -> object:
    """Return the objectives as sections; the name of a metric stands for a section with that alone."""
    if isinstance(objective, list):
        return [_sections(each) if isinstance(each, str) else each for each in objective]
    return {"metric": objective} if isinstance(objective, str) else objective


def _as_written(error: FieldError, written: Mapping[Any, Any]) -> FieldError:
    """Return an error under the path that the file has, where one objective may stand without a list."""
    if isinstance(written.get("objective"), list):
        return error
    return replace(error, field=error.field.replace("objective[0]", "objective", 1))


def with_lines(errors: list[FieldError], lines: Mapping[str, int | None], source: str) -> SpecError:
    """Return the error of a file, each of its parts with the line on which the field stands, or what holds it."""

    def line_of(path: str) -> int | None:
        while path and path not in lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return lines.get(path)

    return SpecError([replace(error, line=error.line or line_of(error.field)) for error in errors], source)


def _known(value: Mapping[Any, Any], place: Place, path: str, errors: list[FieldError]) -> dict[str, Any]:
    """Return a record without unknown names, which are reported."""
    assert place.record is not None, f"{path} is a record"
    names = list(place.record.model_fields)
    known: dict[str, Any] = {}
    for key, item in value.items():
        name, written = str(key), step(path, str(key))
        inner = place.inside(name)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            whose = f"the fields of {path} are" if path else "the fields are"
            fix = f"did you mean {step(path, near[0])}?" if near else f"{whose} {', '.join(names)}"
            errors.append(FieldError(written, "unknown field", item, fix))
        elif inner and inner.record and isinstance(item, Mapping):
            known[name] = _known(item, inner, written, errors)
        elif inner and (each := inner.inside(0)) and each.record and isinstance(item, list | Mapping):
            items = item if isinstance(item, list) else [item]
            known[name] = [_known(one, each, written, errors) if isinstance(one, Mapping) else one for one in items]
        else:
            known[name] = item
    return known


def _broken_rules(tune: TuneSpec) -> Iterator[FieldError]:
    search = tune.search
    if search.trials is None and search.sampler != "grid":
        rule = f"is required for search.sampler {search.sampler}, which has no end of its own"
        yield FieldError("search.trials", rule, None, "write how many trials are started, such as trials: 20")
    if len(tune.objective) == 2:
        if tune.prune.method != "none":
            rule = "can't judge a trial by two objectives"
            yield FieldError("prune.method", rule, tune.prune.method, "set prune.method to none, or name one objective")
        if search.sampler == "cmaes":
            rule = "cmaes follows one objective"
            yield FieldError("search.sampler", rule, search.sampler, "take tpe, random, qmc or grid")
        if tune.objective[0].metric == tune.objective[1].metric:
            rule = f"names {tune.objective[0].metric} twice"
            yield FieldError("objective", rule, tune.objective[0].metric, "name two metrics, or one")
