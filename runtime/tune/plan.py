"""The plan of a study: what its settings ask for, which run a trial is, and which trials come next. No torch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import FieldError
from trimaran.runtime.spec import RunSpec, SpecError
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
_FIRST_DRAWS: Final = 50


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
        base, _ = read_raw(tune.base)
        return Plan.of(tune, base, lines, str(path))

    @staticmethod
    def of_study(found: Found) -> "Plan":
        """Return the plan of a study that was begun."""
        return Plan.of(found.tune, found.base, {}, "the settings of the study")

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
        trials = list(found.trials)
        new: list[Trial] = []
        for index, part in enumerate(self.parts):
            of_part = [trial for trial in trials if trial.rung == part.rung]
            wanted = self.tune.search.trials if part.trials is None else part.trials
            search = self.tune.search.model_copy(update={"trials": wanted})
            while wanted is None or sum(trial.state != "invalid" for trial in of_part) < wanted:
                values = self._values(search, index, part, trials)
                trial = None if values is None else self._trial(values, part, len(trials))
                if trial is None:
                    break
                for each in (trials, of_part, new):
                    each.append(trial)
                if trial.state == "running":
                    return new
                if len(new) >= _MOST_INVALID and search.sampler != "grid":
                    rules = Counter(str(each.error) for each in new)
                    rule, count = rules.most_common(1)[0]
                    raise StudyError(f"the last {len(new)} combinations all break a rule, {count} of them: {rule}")
        return new

    def _values(self, search: SearchSection, index: int, part: Part, trials: Sequence[Trial]) -> dict[str, Any] | None:
        """Return the values to try next, None at the end of the part and while what it follows is being searched."""
        if part.follows is not None and self.ladder is not None:
            base = [trial for trial in trials if trial.rung == part.follows]
            return carried_values([FIELDS[name] for name in self.ladder.names], base)
        of_part = [trial for trial in trials if trial.rung == part.rung]
        coordinates = propose(search, self.tune.objective, self.space, index, of_part)
        return None if coordinates is None else self.space.values_at(coordinates)

    def _trial(self, values: dict[str, Any], part: Part, number: int) -> Trial:
        trial = Trial(number=number, values=values, state="running", folder=f"{TRIALS}/{number:05d}", rung=part.rung)
        try:
            spec = self.space.spec_of(values, part, {})
        except SpecError as error:
            return trial.model_copy(update={"state": "invalid", "error": rule_of(error)})
        wrong = wrong_objectives(self.tune, spec)
        if wrong:
            return trial.model_copy(update={"state": "invalid", "error": f"{wrong[0].field} {wrong[0].rule}"})
        shape = spec.transformer
        sizes = {
            "parameters": shape.num_parameters(),
            "parameters_without_embeddings": shape.num_parameters_without_embeddings(),
        }
        return trial.model_copy(update=sizes)

    def first_spec(self) -> RunSpec:
        """Return the run of some trial that can be started; `of` has made sure that there is one."""
        return next(self._valid_specs(self.parts[0], []))

    def _valid_specs(self, part: Part, errors: list[SpecError]) -> Iterator[RunSpec]:
        """Yield the runs of some draws of a part, and add the errors of those between them to `errors`."""
        for coordinates in draws(self.space, _FIRST_DRAWS):
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
                where = f"in every run of space over {self.tune.base}"
                return [
                    FieldError("base", f"{where}, {error.field} {error.rule}", None, error.suggestion)
                    for error in failures[0].errors
                ]
            if spec.launcher.nodes > 1:
                rule = f"has launcher.nodes {spec.launcher.nodes}, and a trial runs on one node"
                return [FieldError("base", rule, self.tune.base, f"set launcher.nodes to 1 in {self.tune.base}")]
            wrong = wrong_objectives(self.tune, spec)
            if wrong:
                return wrong
        return []
