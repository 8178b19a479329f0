"""A study as people see it: the table of its trials, and how many ended in which way. No torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from trimaran.launchers.terminal import new_table
from trimaran.models.fields import counted
from trimaran.runtime.tune.outcome import best_trials, losses_of_trial, shown
from trimaran.runtime.tune.study import Found, Trial

if TYPE_CHECKING:
    from rich.table import Table

_MOST_LIVE: Final = 20


def table_of(found: Found, trials: Sequence[Trial]) -> "Table":
    """Return the table of some trials: a column for each key of the space and each objective."""
    keys, objectives = list(found.tune.space), found.tune.objective
    rungs = ["rung"] * any(trial.rung for trial in trials)
    names = [objective.metric for objective in objectives]
    table = new_table("trial", "state", *rungs, *(_short(keys)[key] for key in keys), "tokens", *names)
    best = {trial.number for trial in best_trials(objectives, found.trials)}
    for trial in trials:
        figures = [shown(value) for value in trial.objectives] if trial.objectives else ["-"] * len(names)
        if trial.state == "running" and trial.curve and names[0] == "held_out_loss":
            figures[0] = f"({shown(trial.curve[-1].held_out_loss)})"
        values = [shown(trial.values[key]) if key in trial.values else "" for key in keys]
        mark = " *" if trial.number in best else ""
        rung = [trial.rung or ""] * bool(rungs)
        table.add_row(f"{trial.number}{mark}", trial.state, *rung, *values, f"{trial.tokens:,}", *figures)
    return table


def live_table_of(found: Found) -> "Table":
    """Return the trials that run, and the best ones, as far as they fit on a screen."""
    objectives = found.tune.objective
    running = [trial for trial in found.trials if trial.state == "running"]
    done = [trial for trial in found.trials if trial.objectives is not None and trial.state == "complete"]
    done.sort(key=lambda trial: losses_of_trial(objectives, trial))
    table = table_of(found, [*running, *done][:_MOST_LIVE])
    table.caption = summary_of(found)
    return table


def summary_of(found: Found) -> str:
    """Return how many trials ended in which way."""
    states = Counter(trial.state for trial in found.trials)
    parts = [f"{count} {state}" for state, count in states.items() if state != "invalid"]
    if states["invalid"]:
        parts.append(f"{counted(states['invalid'], 'combination')} against the rules")
    return ", ".join(parts) or "no trial yet"


def notes_of(found: Found) -> Iterator[str]:
    """Yield a sentence for each trial that failed or diverged, and for each rule that combinations broke."""
    for trial in found.trials:
        if trial.state in ("failed", "diverged"):
            tries = f" after {counted(trial.attempts, 'attempt')}" if trial.attempts > 1 else ""
            yield f"trial {trial.number} {trial.state}{tries}: {trial.error}"
    rules = Counter(str(trial.error) for trial in found.trials if trial.state == "invalid")
    for rule, count in rules.most_common():
        yield f"{counted(count, 'combination')} against a rule: {rule}"


def line_of(found: Found, trial: Trial) -> str:
    """Return the line that tells the end of a trial."""
    values = ", ".join(f"{key} {shown(value)}" for key, value in trial.values.items())
    names = [objective.metric for objective in found.tune.objective]
    figures = [f"{name} {shown(value)}" for name, value in zip(names, trial.objectives or (), strict=False)]
    best = [each.number for each in best_trials(found.tune.objective, found.trials)]
    mark = " (best so far)" if trial.number in best else ""
    why = f"; {trial.error}" if trial.error and trial.state != "complete" else ""
    return f"trial {trial.number} {trial.state}: {', '.join(figures) or 'no figure'}{mark}; {values}{why}"


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Return a heading for each key: the names of its fields without their sections, where that is clear."""
    short = {key: ", ".join(name.strip().rpartition(".")[2] for name in key.split(",")) for key in keys}
    counts = Counter(short.values())
    return {key: name if counts[name] == 1 else key for key, name in short.items()}
