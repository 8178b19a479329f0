"""The plan of a study: what its settings ask for, which run a trial is, and which trials come next. No torch."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import FieldError
from trimaran.runtime.spec import RunSpec, SpecError
from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.loading import read_raw
from trimaran.runtime.tune.ladder import FIELDS, Ladder, ladder_of
from trimaran.runtime.tune.objective import wrong_objectives
from trimaran.runtime.tune.propose import check_sampler, draws, propose
from trimaran.runtime.tune.space import Part, Space, rule_of, space_of
from trimaran.runtime.tune.study import Found, StudyError, Trial
from trimaran.runtime.tune.transfer import carried_values
from trimaran.runtime.tune.tune_spec import SearchSection, TuneSpec, load_tune, with_lines

TRIALS: Final = "trials"
"""Folder of the trials' run folders in that of the study."""
_MOST_INVALID: Final = 200
"""Proposals in a row that break a rule, after which the search ends."""
_FIRST_DRAWS: Final = 200
_MOST_TRIED: Final = 2_000
"""Combinations of a space that are all looked at before it is called without a run."""


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Args:
        base: the sections of the base spec, as its file has them.
        parts: are searched one after the other, each by itself.
        ladder: None where the sizes of the model don't vary.
    """

    tune: TuneSpec
    base: Mapping[str, Any]
    space: Space
    parts: tuple[Part, ...]
    ladder: Ladder | None = None

    @staticmethod
    def of(tune: TuneSpec, base: Mapping[str, Any], lines: Mapping[str, int | None], source: str) -> "Plan":
        """Return the plan of these settings.

        Args:
            lines: of the paths in the file `source`.

        Raises:
            SpecError: the settings can't be searched; holds all errors.
        """
        space, errors = space_of(tune.space, base, tune.base, is_grid=tune.search.sampler == "grid")
        if errors:
            raise with_lines(errors, lines, source)
        ladder, errors = ladder_of(tune, space)
        if errors:
            raise with_lines(errors, lines, source)
        trials = tune.search.trials
        plan = Plan(tune, base, space, ladder.parts(trials) if ladder else (Part(trials=trials),), ladder)
        errors = plan._problems()
        if errors:
            raise with_lines(errors, lines, source)
        check_sampler(tune.search, space)
        return plan

    @staticmethod
    def load(path: Path) -> "Plan":
        """Return the plan of a TUNE.yaml. Raises SpecError."""
        tune, lines = load_tune(path)
        try:
            base, _ = read_raw(tune.base)
        except SpecError as error:
            if error.errors[0].field != str(tune.base) or not error.errors[0].rule.startswith("cannot be read"):
                raise
            found = FieldError("base", f"{tune.base} {error.errors[0].rule}", None, "name the YAML file of a run")
            raise with_lines([found], lines, str(path)) from error
        return Plan.of(tune, base, lines, str(path))

    @staticmethod
    def of_study(found: Found) -> "Plan":
        """Return the plan of a study that was begun.

        Raises:
            SpecError: its settings can't be searched by this version.
            StudyError: a trial is none of its trials.
        """
        plan = Plan.of(found.tune, found.base, {}, "the settings of the study")
        plan.check(found.trials)
        return plan

    def check(self, trials: Sequence[Trial]) -> None:
        """Raise StudyError where somebody has written a trial into the study that is none of this plan."""
        for trial in trials:
            values = ", ".join(f"{key} {show(value)}" for key, value in trial.values.items())
            if trial.folder != _folder_of(trial.number):
                what = f"has the folder {trial.folder!r} instead of {_folder_of(trial.number)!r}"
            elif not self.holds(trial):
                rung = f" of rung {trial.rung}" if trial.rung else ""
                what = f"has values{rung} that space does not have ({values})"
            else:
                continue
            raise StudyError(f"trial {trial.number} in study.jsonl {what}; remove its lines: it is then tried again")

    def part_of(self, trial: Trial) -> int:
        """Return the number of the part that a trial belongs to."""
        return next(number for number, part in enumerate(self.parts) if part.rung == trial.rung)

    def holds(self, trial: Trial) -> bool:
        """Return whether a trial's values are points of the space, or were carried to its rung."""
        part = next((part for part in self.parts if part.rung == trial.rung), None)
        return part is not None and (part.follows is not None or self.space.holds(trial.values))

    def rivals_of(self, trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
        """Return the other trials of its part."""
        return [each for each in trials if each.rung == trial.rung and each.number != trial.number]

    def spec_of(self, trial: Trial, others: Mapping[str, Any]) -> RunSpec:
        """Return the run of a trial; `others` are fields that the tuner decides."""
        return self.space.spec_of(trial.values, self.parts[self.part_of(trial)], others)

    def next_trials(self, found: Found) -> list[Trial]:
        """Return the next trial that can be started, after those before it that can't; none at the end of the search.

        Raises:
            StudyError: many combinations in a row break a rule.
        """
        trials, new = list(found.trials), list[Trial]()
        for number in sorted(set(range(trials[-1].number if trials else 0)) - {trial.number for trial in trials}):
            # Its lines were removed: it is proposed again from the trials before it, and its run folder goes on.
            before = [trial for trial in trials if trial.number < number]
            for trial in itertools.islice(self._proposals(before), 1):
                trials.insert(len(before), trial)
                new.append(trial)
                if trial.state == "running":
                    return new
        for trial in self._proposals(trials):
            new.append(trial)
            if trial.state == "running":
                break
            if len(new) >= _MOST_INVALID and self.tune.search.sampler != "grid":
                rules = Counter(str(each.error) for each in new)
                rule, count = rules.most_common(1)[0]
                raise StudyError(
                    f"the last {len(new)} combinations all break a rule, {count} of them: {rule}; "
                    "leave such values out of space"
                )
        return new

    def _proposals(self, found: Sequence[Trial]) -> Iterator[Trial]:
        """Yield the trials to come after those of a study, each as if those before it that can be started ran."""
        trials = list(found)
        for index, part in enumerate(self.parts):
            of_part = [trial for trial in trials if trial.rung == part.rung]
            wanted = self.tune.search.trials if part.trials is None else part.trials
            search = self.tune.search.model_copy(update={"trials": wanted})
            while wanted is None or sum(trial.state != "invalid" for trial in of_part) < wanted:
                values = self._values(search, index, part, trials)
                if values is None:
                    break
                trial = self._trial(values, part, trials[-1].number + 1 if trials else 0)
                trials.append(trial)
                of_part.append(trial)
                yield trial

    def _values(self, search: SearchSection, index: int, part: Part, trials: Sequence[Trial]) -> dict[str, Any] | None:
        """Return the values to try next, None at the end of the part and while what it follows is being searched."""
        if part.follows is not None and self.ladder is not None:
            base = [trial for trial in trials if trial.rung == part.follows]
            return carried_values([FIELDS[name] for name in self.ladder.names], base)
        of_part = [trial for trial in trials if trial.rung == part.rung]
        coordinates = propose(search, self.tune.objective, self.space, index, of_part)
        return None if coordinates is None else self.space.values_at(coordinates)

    def _trial(self, values: dict[str, Any], part: Part, number: int) -> Trial:
        trial = Trial(number=number, values=values, state="running", folder=_folder_of(number), rung=part.rung)
        spec = self.run_of(values, part)
        if isinstance(spec, str):
            return trial.model_copy(update={"state": "invalid", "error": spec})
        shape = spec.transformer
        sizes = {
            "parameters": shape.num_parameters(),
            "parameters_without_embeddings": shape.num_parameters_without_embeddings(),
        }
        return trial.model_copy(update=sizes)

    def run_of(self, values: Mapping[str, Any], part: Part) -> RunSpec | str:
        """Return the run of some values, or the rule that keeps it from being started."""
        try:
            spec = self.space.spec_of(values, part, {})
        except SpecError as error:
            return rule_of(error)
        wrong = wrong_objectives(self.tune, spec)
        return f"{wrong[0].field} {wrong[0].rule}" if wrong else spec

    def first_spec(self) -> RunSpec:
        """Return the run of some trial that can be started; `of` has made sure that there is one."""
        return next(self._valid_specs(self.parts[0], []))

    def _valid_specs(self, part: Part, errors: list[SpecError]) -> Iterator[RunSpec]:
        """Yield the runs of some draws of a part, and add the errors of those between them to `errors`."""
        counts = [dimension.num_points for dimension in self.space.dimensions]
        points = math.prod(count for count in counts if count is not None)
        every = itertools.product(*(range(count or 0) for count in counts))
        is_small = None not in counts and points <= _MOST_TRIED
        for coordinates in every if is_small else draws(self.space, _FIRST_DRAWS):
            try:
                yield self.space.spec_of(self.space.values_at(coordinates), part, {})
            except SpecError as error:
                errors.append(error)

    def _problems(self) -> list[FieldError]:
        """Return why no trial of a part can be started: the errors of the first draw where none has none."""
        for part in self.parts:
            failures: list[SpecError] = []
            spec = next(self._valid_specs(part, failures), None)
            if spec is None:
                where = f"none of {len(failures)} combinations over {self.tune.base} can be started"
                return [
                    FieldError("space", f"{where}: {error.field} {error.rule}", None, error.suggestion)
                    for error in failures[0].errors
                ]
            if spec.launcher.nodes > 1:
                rule = f"has launcher.nodes {spec.launcher.nodes}, and a trial runs on one node"
                return [FieldError("base", rule, self.tune.base, f"set launcher.nodes to 1 in {self.tune.base}")]
            wrong = wrong_objectives(self.tune, spec)
            if wrong:
                return wrong
        return []


def _folder_of(number: int) -> str:
    """Return the run folder of a trial, relative to the study's."""
    return f"{TRIALS}/{number:05d}"
