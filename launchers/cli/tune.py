"""`trimaran tune`: search over fields of the spec; what a study has found so far. Imports no numpy by itself."""

import math
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.cli.common.default_command import RunByDefault
from trimaran.launchers.terminal import new_table, print_table, say, writing_output
from trimaran.launchers.tune.table import notes_of, summary_of, table_of
from trimaran.models.fields import counted
from trimaran.runtime.tune.outcome import best_trials, shown
from trimaran.runtime.tune.study import STUDY, Found, Study, Trial

if TYPE_CHECKING:
    from trimaran.runtime.tune.ladder import Ladder
    from trimaran.runtime.tune.plan import Plan

_DRAWN = 200
_SHOWN = 5


tune = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Search over fields of the spec: `trimaran tune TUNE.yaml`; what was found: `trimaran tune best DIR`.",
)
StudyFolder = Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="The output_dir of a search.")]


@tune.command()
def run(
    tune_path: Annotated[Path, typer.Argument(parser=path, metavar="TUNE", help="The search, a YAML file.")],
    launcher: Annotated[
        Literal["local", "slurm"] | None,
        typer.Option(
            help="Where the trials run: here, or as an array of batch jobs; by default as the base spec says."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be tried (slurm: print the batch script); start nothing.")
    ] = False,
) -> None:
    """Run the trials of a search; the same command goes on where it was interrupted."""
    with errors_as_sentences():
        from trimaran.runtime.tune.plan import Plan

        plan = Plan.load(tune_path)
        study = Study(Path(plan.tune.output_dir), os.environ)
        if (launcher or plan.first_spec().launcher.kind) == "slurm":
            _run_on_slurm(plan, study, dry_run=dry_run)
            return
        if dry_run:
            _describe(plan, study)
            return
        from trimaran.launchers.tune.tuner import tell, tune_here

        _begin(plan, study)
        tune_here(plan, study)
        found = study.read()
        tell(found)
        say(f"{summary_of(found)}; study {study.folder}")
        _conclude(plan, study.folder, found)


def _run_on_slurm(plan: "Plan", study: Study, *, dry_run: bool) -> None:
    from trimaran.launchers.slurm.search import print_script, submit_workers

    if dry_run:
        print_script(plan)
    else:
        _begin(plan, study)
        submit_workers(plan, study)


def _begin(plan: "Plan", study: Study) -> None:
    for change in study.begin(plan.tune, plan.base, plan.holds):
        say(f"changed since the last start: {change}")
    plan.check(study.read().trials)


@tune.command()
def status(folder: StudyFolder) -> None:
    """Print every trial of a search, and how they ended."""
    with errors_as_sentences():
        found = _read(folder)
        print_table(table_of(found, [trial for trial in found.trials if trial.state != "invalid"]))
        with writing_output():
            print(*notes_of(found), summary_of(found), sep="\n")


@tune.command()
def best(folder: StudyFolder) -> None:
    """Print the best trial of a search, of two objectives those that none beats in both, and of a ladder its target."""
    with errors_as_sentences():
        from trimaran.runtime.tune.plan import Plan

        found = _read(folder)
        _conclude(Plan.of_study(found), folder, found)


def _conclude(plan: "Plan", folder: Path, found: Found) -> None:
    """Print what a study comes to, and write its page and of a ladder the spec of its target."""
    from trimaran.launchers.tune.conclude import conclude
    from trimaran.runtime.tune.extrapolate import rows_of

    if not best_trials(found.tune.objective, found.trials):
        raise ValueError(f"no trial in {folder} is complete: {summary_of(found)}")
    if plan.ladder is None:
        _print_best(folder, found)  # before anything is written: on a full disk it is told too
    conclusion = conclude(plan, folder, found.trials)
    if conclusion.extrapolation is not None:
        table = new_table("ladder", "")
        for name, words in rows_of(conclusion.extrapolation):
            table.add_row(name, words)
        print_table(table)
        for sentence in conclusion.extrapolation.untold:
            say(sentence, style="yellow")
    for file in conclusion.files:
        say(f"written: {file}")
    if conclusion.problem:
        raise ValueError(conclusion.problem)


def _read(folder: Path) -> Found:
    study = Study(folder, os.environ)
    if not study.exists():
        raise ValueError(f"{folder} has no {STUDY}, so it is no folder of a search; give the output_dir of a TUNE.yaml")
    return study.read()


def _print_best(folder: Path, found: Found) -> None:
    trials = best_trials(found.tune.objective, found.trials)
    print_table(table_of(found, trials))
    if len(trials) == 1:
        with writing_output():
            print(f"run folder: {folder / trials[0].folder}")
            print(f"train it:   trimaran train {shlex.quote(found.tune.base)} {_settings(trials[0])}".rstrip())


def _settings(trial: Trial) -> str:
    """Return the values of a trial as --set of `trimaran train`."""
    words = []
    for key, value in trial.values.items():
        names = [name.strip() for name in key.split(",")]
        together = value if isinstance(value, tuple) and len(names) > 1 else (value,)
        words += [f"--set {shlex.quote(f'{name}={_yaml(each)}')}" for name, each in zip(names, together, strict=True)]
    return " ".join(words)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(each) for each in value)}]"
    return repr(value) if isinstance(value, float) else shown(value)


def _describe(plan: "Plan", study: Study) -> None:
    """Say what would be tried: the size of the space, how much of it breaks rules, and the first proposals."""
    from trimaran.runtime.tune.propose import draws

    tune = plan.tune
    runs = [plan.run_of(plan.space.values_at(coordinates), plan.parts[0]) for coordinates in draws(plan.space, _DRAWN)]
    rules = Counter(run for run in runs if isinstance(run, str))
    found = study.read() if study.exists() else Found(tune, plan.base, ())
    plan.check(found.trials)
    trials: list[Trial] = []
    while len([trial for trial in trials if trial.state != "invalid"]) < _SHOWN:
        new = plan.next_trials(Found(tune, plan.base, (*found.trials, *trials)))
        trials += new
        if not new:
            break
    total = counted(sum(_num_trials(plan)), "trial")
    metrics = ", ".join(f"{each.metric} ({'min' if each.is_better_lower else 'max'})" for each in tune.objective)
    say(f"{tune.search.sampler} over {counted(len(plan.space.dimensions), 'dimension')}: {total}, for {metrics}")
    broken = sum(rules.values())
    say(f"{_DRAWN - broken} of {_DRAWN} random combinations can be started")
    for rule, count in rules.most_common():
        say(f"  {count} break a rule: {rule}")
    if found.trials:
        say(f"study {study.folder}: {summary_of(found)}")
    keys, rungs = list(tune.space), ["rung"] * (plan.ladder is not None)
    table = new_table("trial", *rungs, *keys)
    for trial in trials:
        if trial.state != "invalid":
            values = (shown(trial.values[key]) if key in trial.values else "" for key in keys)
            table.add_row(str(trial.number), *[trial.rung or ""] * len(rungs), *values)
    say(
        f"the first {counted(table.row_count, 'proposal')}, where no trial has ended before:"
        if not found.trials
        else "next:"
    )
    print_table(table)
    if plan.ladder is not None:
        _describe_ladder(plan, plan.ladder)


def _describe_ladder(plan: "Plan", ladder: "Ladder") -> None:
    """Print the rungs and the target with what they cost."""
    table = new_table("rung", "parameters", "tokens", "trials", "FLOP")
    total = 0.0
    for rung, trials in zip(ladder.rungs, _num_trials(plan), strict=True):
        flops = trials * rung.tokens * rung.flops_per_token
        total += flops
        table.add_row(rung.name, f"{rung.parameters:,}", f"{rung.tokens:,.0f}", str(trials), f"{flops:.3g}")
    target = ladder.target
    flops = target.tokens * target.flops_per_token
    table.add_row("target", f"{target.parameters:,}", f"{target.tokens:,.0f}", "", f"{flops:.3g}")
    print_table(table)
    say(f"the rungs take {total:.3g} FLOP, and the target then {flops:.3g}")


def _num_trials(plan: "Plan") -> list[int]:
    """Return how many trials each part has; a grid's points that break a rule are counted too."""
    points = math.prod(dimension.num_points or 1 for dimension in plan.space.dimensions)
    if plan.tune.search.sampler != "grid":
        return [part.trials or 0 for part in plan.parts]
    return [min(part.trials or points, points) for part in plan.parts]
