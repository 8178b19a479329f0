"""What a study comes to: the page of its pictures, and of a ladder the target with its spec."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimaran.launchers.report.tune_page import SearchResult, write_tune_page
from trimaran.models.fields import counted
from trimaran.runtime.plan.scaling.figures import ScalingError
from trimaran.runtime.spec.errors import show
from trimaran.runtime.tune.extrapolate import Extrapolation, extrapolate, write_extrapolation
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.study import Trial


@dataclass(frozen=True)
class Conclusion:
    """What was written into the folder of a study.

    Attributes:
        extrapolation: of a ladder, as far as it can be told.
        problem: why it can't, a line for each reason; "" where it can or there is no ladder.
        files: the page, and of a ladder the spec of its target.
    """

    extrapolation: Extrapolation | None
    problem: str
    files: tuple[Path, ...]


def conclude(plan: Plan, folder: Path, trials: Sequence[Trial]) -> Conclusion:
    """Write the page of a study, and of a ladder target.yaml and ladder.json."""
    found, problem = None, ""
    files = []
    if plan.ladder is not None:
        try:
            found = extrapolate(plan.ladder, plan.space, trials, str(folder / "target"))
            files.append(write_extrapolation(found, folder))
        except ScalingError as error:
            problem = str(error)
    result = SearchResult(
        folder.name, plan.tune.objective, plan.space, trials, plan.ladder, found, problem, _settings(plan)
    )
    files.append(write_tune_page(result, folder))
    return Conclusion(found, problem, tuple(files))


def _settings(plan: Plan) -> list[tuple[str, str]]:
    """Return rows of what a search was asked for."""
    tune = plan.tune
    prune = tune.prune
    rows = [("base", tune.base), *((f"space: {key}", show(value)) for key, value in tune.space.items())]
    trials = f", {counted(tune.search.trials, 'trial')}" if tune.search.trials is not None else ""
    rows.append(("search", f"{tune.search.sampler}{trials}, seed {tune.search.seed}"))
    if prune.method != "none":
        rows.append(("prune", f"{prune.method} from step {prune.first_step} on"))
    metrics = (f"{each.metric} ({'min' if each.is_better_lower else 'max'})" for each in tune.objective)
    return [*rows, ("objective", ", ".join(metrics))]
