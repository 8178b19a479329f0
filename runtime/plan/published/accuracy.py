"""How far the planner's figures lie from the published ones: the rows of `trimaran plan --published`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from trimaran.runtime.plan.cases import Array, Cases
from trimaran.runtime.plan.memory.habits import GIB, HABITS, habits_of, rank_bytes
from trimaran.runtime.plan.published.tables import PublishedRun, read_table
from trimaran.runtime.plan.published.winners import places_of_winners
from trimaran.runtime.plan.time.calibrations import Calibration, Shipped, calibration_for
from trimaran.runtime.plan.time.constants import DEFAULT, Constants
from trimaran.runtime.plan.time.fit import Measured, fit

SOFTWARES: Final = (
    "megatron-2021", "megatron-2022", "mcore-2024", "megatron-deepspeed-2022", "vtrain-mds", "deepspeed-z3-2021",
    "llm-foundry", "internevo", "nanotron",
)  # fmt: skip
SINGLE_NODE: Final = "single node"
_POOLED_SPREAD: Final = 1.5  # between a guess and what all softwares have in common


@dataclass(frozen=True)
class Accuracy:
    """Errors of one set of rows.

    Attributes:
        bar: what was promised, in words; "" where nothing was.
        holds: whether it holds.
    """

    what: str
    rows: int
    figures: str
    bar: str
    holds: bool


def published_runs(folder: Path) -> tuple[list[PublishedRun], list[PublishedRun]]:
    """Return the timed runs and those with a memory figure. Raises as `read_table`."""
    timed = [run for run in read_table(folder / "runs.csv") if run.cases]
    return timed, [run for run in read_table(folder / "memory.csv") if run.cases]


def group_of(run: PublishedRun) -> tuple[str, str, str, str]:
    """Return what is fitted together: software, chip, dtype and, for vTrain, its single node or its clusters."""
    return run.stack, run.chip, run.dtype, SINGLE_NODE if SINGLE_NODE in run.source else ""


def of_16_bits(runs: Iterable[PublishedRun]) -> list[PublishedRun]:
    """Return the runs in 16 bits of the nine softwares, without vTrain's small models on one node."""
    return [run for run in runs if run.stack in SOFTWARES and run.dtype != "fp8" and SINGLE_NODE not in run.source]


def calibrate(runs: Sequence[PublishedRun]) -> tuple[Calibration, list[Calibration]]:
    """Fit the default on the 16-bit runs, then every group's constants around it."""
    main = of_16_bits(runs)
    pooled = fit(Measured(main), DEFAULT, _POOLED_SPREAD)
    groups: dict[tuple[str, str, str, str], list[PublishedRun]] = defaultdict(list)
    for run in runs:
        if run.stack in SOFTWARES or run.dtype == "fp8":
            groups[group_of(run)].append(run)
    made = []
    for (software, chip, dtype, group), own in groups.items():
        # Small models on one node are bound by the host, of which the large ones say nothing.
        constants = fit(Measured(own), DEFAULT if group else pooled)
        made.append(_calibration(own, constants, (software, chip, dtype, group)))
    return _calibration(main, pooled, ("default", "any", "bfloat16", "")), made


def _calibration(runs: Sequence[PublishedRun], constants: Constants, names: tuple[str, str, str, str]) -> Calibration:
    errors = np.abs(np.exp(Measured(runs).log_errors(constants)) - 1)
    software, chip, dtype, group = names
    gpus = [run.gpus for run in runs]
    return Calibration(
        software=software,
        chip=chip,
        dtype=dtype,
        group=group,
        runs=len(runs),
        gpus=(min(gpus), max(gpus)),
        median=round(float(np.median(errors)), 4),
        p90=round(float(np.quantile(errors, 0.9)), 4),
        constants={name: float(f"{value:.6g}") for name, value in vars(constants).items()},
    )


def left_out_errors(runs: Sequence[PublishedRun], fold_of: Callable[[PublishedRun], int], folds: int) -> Array:
    """Return the log errors of runs, each predicted by a fit on the other folds' runs."""
    errors = []
    for fold in range(folds):
        train = [run for run in runs if fold_of(run) != fold]
        default, made = calibrate(train)
        test = [run for run in runs if fold_of(run) == fold]
        errors.append(_log_errors(test, default, made))
    return np.concatenate(errors)


def predicted(runs: Sequence[PublishedRun], found: Shipped) -> Array:
    """Return the seconds of a step that the shipped constants give for each run."""
    seconds = np.array([run.seconds for run in runs])
    return np.asarray(seconds * np.exp(_log_errors(runs, found.default, found.calibrations)))


def _log_errors(runs: Sequence[PublishedRun], default: Calibration, made: Sequence[Calibration]) -> Array:
    by_group = {(each.software, each.chip, each.dtype, each.group): each for each in made}
    errors = np.empty(len(runs))
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        groups[group_of(run)].append(index)
    for group, rows in groups.items():
        constants = by_group.get(group, default).values()
        errors[rows] = Measured([runs[row] for row in rows]).log_errors(constants)
    return errors


def shares(errors: Array) -> tuple[float, float, float]:
    """Return the median of |predicted / measured - 1|, and the shares of rows within 10% and 20%."""
    sizes = np.abs(np.exp(errors) - 1)
    return float(np.median(sizes)), float(np.mean(sizes <= 0.1)), float(np.mean(sizes <= 0.2))


def _row(what: str, errors: Array, bar: str, limits: tuple[float, float, float]) -> Accuracy:
    return _row_of(what, len(errors), shares(errors), bar, limits)


def _row_of(
    what: str, rows: int, found: tuple[float, float, float], bar: str, limits: tuple[float, float, float]
) -> Accuracy:
    median, ten, twenty = found
    holds = median <= limits[0] and ten >= limits[1] and twenty >= limits[2]
    return Accuracy(what, rows, f"median {median:.1%}; within 10% {ten:.0%}; within 20% {twenty:.0%}", bar, holds)


def time_rows(runs: Sequence[PublishedRun], found: Shipped) -> list[Accuracy]:
    """Return the rows about step times, in the order of the table."""
    errors = np.log(predicted(runs, found) / np.array([run.seconds for run in runs]))
    chosen = {id(run): index for index, run in enumerate(runs)}

    def of(rows: Iterable[PublishedRun]) -> Array:
        return np.asarray(errors[[chosen[id(run)] for run in rows]])

    main = of_16_bits(runs)
    single = of(run for run in runs if run.stack == "vtrain-mds" and SINGLE_NODE in run.source)
    several = of(run for run in runs if run.stack == "vtrain-mds" and SINGLE_NODE not in run.source)
    means = [float(np.mean(np.abs(np.exp(each) - 1))) for each in (single, several)]
    default = Measured(main).log_errors(found.default.values())
    best, tau, groups = ranking(runs, predicted(runs, found))
    left = found.left_out
    return [
        _row("step time, 16-bit, 9 softwares", of(main), "3.0; 85; 97%", (0.0305, 0.845, 0.965)),
        Accuracy("vTrain, single node", len(single), f"mean {means[0]:.1%}", "7.0%", means[0] <= 0.0705),
        Accuracy("vTrain, several nodes", len(several), f"mean {means[1]:.1%}", "7.0%", means[1] <= 0.0705),
        _row_of("left out, 5 folds", len(main), left["rows"], "3.6; 84; 95%", (0.0365, 0.835, 0.945)),
        _row_of("left out, by whole models", len(main), left["models"], "4.3; 79%", (0.0435, 0.785, 0.0)),
        _row("datasheet and one default set", default, "9; -; 76%", (0.0905, 0.0, 0.755)),
        _row("fp8, NeMo", of(r for r in runs if r.stack == "nemo"), "-; 89%", (1.0, 0.885, 0.0)),
        Accuracy(
            "vTrain: best layout in the first 3", groups, f"{best:.0%}; mean tau {tau:.2f}", "92%; 0.8",
            best >= 0.915 and tau >= 0.795,
        ),
        _winners(runs, found),
    ]  # fmt: skip


def _winners(runs: Sequence[PublishedRun], found: Shipped) -> Accuracy:
    """Of nanotron's winners: those whose tp x pp x dp is among the first 3, and those whose microbatch is too.

    By the default set, as a search without a software; its own constants were fitted on winners alone.
    """
    own = [run for run in runs if run.stack == "nanotron"]
    calibration, _ = calibration_for(found, "nanotron", own[0].chip, "bfloat16")
    counts = [
        [sum(place[index] <= 3 for place in places_of_winners(own, each.values())) for index in (0, 1)]
        for each in (found.default, calibration)
    ]
    (grids, layouts), (fitted, _) = counts
    figures = f"{grids}/{len(own)}; with the microbatch {layouts}/{len(own)}; by its own constants {fitted}/{len(own)}"
    return Accuracy("nanotron: best tp x pp x dp in the first 3", len(own), figures, "14/18", grids >= 14)


def memory_rows(runs: Sequence[PublishedRun]) -> list[Accuracy]:
    """Return the rows about memory, in the order of the table."""
    promised = {"megatron-deepspeed-2022": 0.87, "nanotron": 0.83, "torchtitan": 0.72}
    made = []
    for name in ("megatron-deepspeed-2022", "nanotron", "torchtitan", "internevo", "megatron-2022"):
        own = [run for run in runs if run.stack.startswith(name)]
        errors = np.abs(planned_gib(own) / np.array([run.gib for run in own]) - 1)
        ten, bar = float(np.mean(errors <= 0.1)), promised.get(name, 0.0)
        words = f"within 10% {ten:.0%}; within 20% {np.mean(errors <= 0.2):.0%}"
        made.append(Accuracy(f"memory, {name}", len(own), words, f"{bar:.0%}" if bar else "", ten >= bar - 0.005))
    return made


def pairs_of(
    timed: Sequence[PublishedRun], held: Sequence[PublishedRun], found: Shipped
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return by unit and software what was measured beside what is predicted, of time and of memory."""
    made: dict[str, dict[str, list[tuple[float, float]]]] = {"seconds of a step": {}, "GiB of the fullest rank": {}}
    for run, seconds in zip(timed, predicted(timed, found), strict=True):
        made["seconds of a step"].setdefault(run.stack, []).append((run.seconds, float(seconds)))
    for name in HABITS:
        own = [run for run in held if run.stack.startswith(name)]
        if own:
            made["GiB of the fullest rank"][name] = [
                (run.gib, float(gib)) for run, gib in zip(own, planned_gib(own), strict=True)
            ]
    return made


def planned_gib(runs: Sequence[PublishedRun]) -> Array:
    """Return the GiB of the fullest rank of each run, all of one software whose habits are known."""
    habits = habits_of(runs[0].stack)
    assert habits is not None, runs[0].stack
    parts = rank_bytes(Cases.of(run.cases[0] for run in runs), habits)
    return np.asarray(sum(parts.values()) / GIB)


def ranking(runs: Sequence[PublishedRun], seconds: Array) -> tuple[float, float, int]:
    """Return of vTrain's jobs with at least 5 layouts: the share whose best is among the first 3, mean tau, number.

    Tau is Kendall's, without a correction for ties, averaged over the groups.
    """
    groups: Mapping[tuple[object, ...], list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        if run.stack == "vtrain-mds":
            case = run.cases[0]
            groups[(run.source, run.gpus, case.layers, case.hidden, case.heads, case.seq, case.batch)].append(index)
    found = [rows for rows in groups.values() if len(rows) >= 5]
    hits, taus = [], []
    for rows in found:
        measured = np.array([runs[row].seconds for row in rows])
        planned = seconds[rows]
        hits.append(bool(np.argmin(measured) in np.argsort(planned)[:3]))
        first, second = np.triu_indices(len(rows), 1)
        agree = np.sign((measured[first] - measured[second]) * (planned[first] - planned[second]))
        taus.append(float(np.mean(agree)))
    return float(np.mean(hits)), float(np.mean(taus)), len(found)
