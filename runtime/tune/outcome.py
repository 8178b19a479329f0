"""The best trials of a study, and values in the words of its tables and its page. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection


def best_trials(objectives: Sequence[ObjectiveSection], trials: Sequence[Trial]) -> list[Trial]:
    """Return the best complete trial, or of two objectives the Pareto front: those that none beats in both."""
    done = [trial for trial in trials if trial.state == "complete" and trial.objectives is not None]
    losses = {trial.number: losses_of_trial(objectives, trial) for trial in done}
    if len(objectives) == 1:
        return sorted(done, key=lambda trial: losses[trial.number])[:1]
    front = [
        trial
        for trial in done
        if not any(
            all(a <= b for a, b in zip(losses[other.number], losses[trial.number], strict=True))
            and losses[other.number] != losses[trial.number]
            for other in done
        )
    ]
    return sorted(front, key=lambda trial: losses[trial.number])


def losses_of_trial(objectives: Sequence[ObjectiveSection], trial: Trial) -> tuple[float, ...]:
    """Return what is to be made small of a complete trial."""
    assert trial.objectives is not None, "the trial is complete"
    return tuple(
        value if objective.is_better_lower else -value
        for objective, value in zip(objectives, trial.objectives, strict=True)
    )


def shown(value: Any) -> str:
    """Return a value for a person: numbers with four digits."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(shown(each) for each in value)}]"
    return str(value)
