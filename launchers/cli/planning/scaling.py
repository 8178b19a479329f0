"""`trimaran scaling`: how many tokens, parameters, or both, by published laws and by one that is fitted to runs."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.cli.planning.plan import check_folders
from trimaran.launchers.terminal import print_table, say
from trimaran.models.fields import counted
from trimaran.runtime.files import read_text, write_text
from trimaran.runtime.plan.scaling.intervals import Draws, draws_of, interval, shipped_draws
from trimaran.runtime.plan.scaling.laws import (
    DEFAULT,
    FLOPS_PER_PARAMETER_AND_TOKEN,
    LARGEST_RUN,
    LAWS,
    TOKENS_PER_PARAMETER,
    LossFormula,
    read_count,
)
from trimaran.runtime.spec import load_spec

if TYPE_CHECKING:
    from rich.table import Table

    from trimaran.runtime.plan.scaling.figures import Run
    from trimaran.runtime.plan.scaling.fit import LossLaw
    from trimaran.runtime.plan.scaling.isoflops import IsoFlop
    from trimaran.runtime.plan.scaling.optima import PowerLaw

scaling = typer.Typer(no_args_is_help=True, help="How many tokens and parameters a budget is best spent on.")
_FACTORS = (0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
_FEWEST_RUNS, _LEAST_SPREAD, _FAR = 6, 4.0, 100.0
_MOST_FITS = 8  # without what lies far off the fit before
_MOST_NAMED = 20  # outliers, one by one


@scaling.command()
def tokens(parameters: Annotated[str, typer.Argument(metavar="N", help="Parameters, such as 7b or 7e9.")]) -> None:
    """Tell how many tokens a model of N parameters is best trained on, and what more or fewer cost."""
    with errors_as_sentences():
        size = read_count(parameters, "N")
        _print_best((size, TOKENS_PER_PARAMETER * size), lambda law: (size, law.tokens_for(size)))
        _print_factors(size, DEFAULT.tokens_for(size))


@scaling.command()
def params(tokens: Annotated[str, typer.Argument(metavar="TOKENS", help="Tokens, such as 2t or 2e12.")]) -> None:
    """Tell for how many parameters a text of so many tokens is the best."""
    with errors_as_sentences():
        count = read_count(tokens, "TOKENS")
        _print_best((count / TOKENS_PER_PARAMETER, count), lambda law: (law.parameters_for(count), count))


@scaling.command()
def budget(
    flops: Annotated[str | None, typer.Argument(metavar="[FLOP]", help="Compute, such as 5.76e23.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="In place of FLOP: GPU-hours.")] = None,
    chip: Annotated[str, typer.Option(metavar="NAME", help="With --gpu-hours: accelerator.")] = "H100-SXM",
    mfu: Annotated[float, typer.Option(help="With --gpu-hours: share of the chip's peak.")] = 0.4,
) -> None:
    """Tell how many parameters and tokens a budget is best spent on."""
    with errors_as_sentences():
        if (flops is None) == (gpu_hours is None):
            raise ValueError("a budget is FLOP or --gpu-hours: give one of the two")
        if flops is not None:
            compute = _read_flops(flops)
        else:
            from trimaran.runtime.plan.chips import chip_named

            if gpu_hours is None or not 0 < gpu_hours < math.inf:
                raise ValueError(f"--gpu-hours must be above 0 and finite; got {gpu_hours}")
            if not 0 < mfu <= 1:
                raise ValueError(f"--mfu must be above 0 and at most 1; got {mfu}")
            compute = gpu_hours * 3600 * chip_named(chip).flops * mfu
        size = math.sqrt(compute / FLOPS_PER_PARAMETER_AND_TOKEN / TOKENS_PER_PARAMETER)
        _print_best((size, TOKENS_PER_PARAMETER * size), lambda law: law.best(compute))


def _read_flops(text: str) -> float:
    try:
        return read_count(text, "FLOP")
    except ValueError as error:
        hours = "; hours of GPUs are --gpu-hours" if re.search(r"h(ou)?r?s?$", text.strip(), re.IGNORECASE) else ""
        raise ValueError(f"{error}{hours}") from error


@scaling.command()
def fit(
    tables: Annotated[
        list[Path],
        typer.Argument(parser=path, metavar="RUN|CSV...", help="Folders of runs, and tables of runs, a row each."),
    ],
    at: Annotated[list[str], typer.Option(metavar="FLOP", help="Optimum at this compute; may repeat.")] = [],  # noqa: B006
    without_outliers: Annotated[
        bool, typer.Option("--without-outliers", help="Fit once more without the runs that lie far off the first fit.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Draw IsoFLOP curves and frontier as an .svg file.")
    ] = None,
) -> None:
    """Fit E + A/N^a + B/D^b to runs, with 95% intervals. A table's columns: parameters, loss, and tokens or flop."""
    with errors_as_sentences():
        computes = [read_count(each, "--at") for each in at]
        if picture is not None and picture.suffix != ".svg":
            raise ValueError(f"--picture must end in .svg; got {picture}")
        check_folders({"--picture": picture})
        runs = [run for table in tables for run in ([read_run(table)] if table.is_dir() else _read_runs(table))]
        _check_spread(runs)
        fitted = _fitted(runs, without_outliers)
        _print_fit(fitted, computes)
        if picture is not None:
            from trimaran.launchers.report.scaling_charts import scaling_picture

            write_text(picture, scaling_picture(runs, fitted.far_off, fitted.curves, fitted.formula, fitted.line))
            say(f"IsoFLOP curves and frontier drawn in {picture}")


@dataclass(frozen=True)
class _Fitted:
    """A law of runs.

    Attributes:
        runs: that it was fitted on.
        far_off: outliers, in `runs` or left out of them.
        formula: the law without its intervals.
        line: the best size over compute by IsoFLOP curves; None for too few of them.
    """

    runs: "list[Run]"
    far_off: "list[Run]"
    law: "LossLaw"
    formula: LossFormula
    curves: "list[IsoFlop]"
    line: "PowerLaw | None"


def _fitted(runs: "list[Run]", without_outliers: bool) -> _Fitted:
    from trimaran.runtime.plan.scaling.fit import fit_two_variables
    from trimaran.runtime.plan.scaling.isoflops import frontier, isoflops, outliers

    kept = runs
    law = fit_two_variables(kept)
    far_off = outliers(runs, _formula(law).loss)
    for _ in range(_MOST_FITS if without_outliers else 0):
        kept = [run for run in runs if run not in far_off]
        _check_spread(kept)
        law = fit_two_variables(kept)
        before, far_off = far_off, outliers(runs, _formula(law).loss)
        if far_off == before:
            break
    formula = _formula(law)
    curves = isoflops([run for run in runs if run not in far_off], formula.loss)
    return _Fitted(kept, far_off, law, formula, curves, frontier(curves))


def _formula(law: "LossLaw") -> LossFormula:
    e, a_factor, a, b_factor, b = (law.constants[name].value for name in ("E", "A", "a", "B", "b"))
    return LossFormula("fitted", e, a_factor, a, b_factor, b, "these runs")


def _print_fit(fitted: _Fitted, computes: list[float]) -> None:
    from rich.table import Table

    table = Table("constant", "fitted", "95% interval", box=None)
    for name, found in fitted.law.constants.items():
        table.add_row(name, f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}")
    print_table(table)
    say(f"{counted(len(fitted.runs), 'run')}; they scatter around the law by {fitted.law.scatter:.2%}")
    for run in fitted.far_off[:_MOST_NAMED]:
        where = f"{run.parameters:.4g} parameters, {run.tokens:.4g} tokens"
        say(f"outlier: {where}: loss {run.loss:.4g}, by the law {fitted.formula.loss(run.parameters, run.tokens):.4g}")
    left_out = fitted.far_off and not set(fitted.far_off) & set(fitted.runs)
    if fitted.far_off:
        more = "were left out" if left_out else "count in the fit; --without-outliers leaves them out"
        say(f"{len(fitted.far_off)} outliers {more}")
    _print_curves(fitted)
    _print_optima(fitted, computes)


def _print_curves(fitted: _Fitted) -> None:
    from rich.table import Table

    if not fitted.curves:
        say("no IsoFLOP curves: they take five runs or more of about one compute")
        return
    table = Table("IsoFLOP curve", "runs", "best parameters", "95% interval", "loss", box=None)
    for curve in fitted.curves:
        cells = (curve.why, "", "")
        if curve.best is not None:
            size = curve.size
            cells = (f"{size.value:.3g}", f"{size.low:.3g} to {size.high:.3g}", f"{curve.best.loss.value:.4g}")
        table.add_row(f"{curve.flops:.3g} FLOP", str(len(curve.runs)), *cells)
    print_table(table)
    if fitted.line is not None:
        say(f"by them the best size grows with the compute to the power {fitted.line.exponents[0]}")


def _print_optima(fitted: _Fitted, computes: list[float]) -> None:
    most = max(FLOPS_PER_PARAMETER_AND_TOKEN * run.parameters * run.tokens for run in fitted.runs)
    if computes:
        draws = draws_of(fitted.law)
        best = [partial(LossFormula.best, flops=compute) for compute in computes]
        rows = [_row("fitted", each(fitted.formula), fitted.formula, draws, each) for each in best]
        print_table(_table(fitted.formula, rows))
    for compute in computes:
        if fitted.line is not None:
            say(f"{compute:.4g} FLOP, by the IsoFLOP curves: {fitted.line.predict(compute, compute)} parameters")
        if compute > _FAR * most:
            say(f"{compute:.4g} FLOP is {compute / most:,.0f} times the largest run: far beyond what was fitted")


def _read_runs(table: Path) -> list["Run"]:
    from trimaran.runtime.plan.scaling.figures import Run

    try:
        reader = csv.DictReader(io.StringIO(read_text(table), newline=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not a text in UTF-8 from byte {error.start} on; give a CSV file") from error
    columns = reader.fieldnames or []
    if "parameters" not in columns or not {"tokens", "flop"} & set(columns):
        raise ValueError(f"{table}: line 1 must name the columns parameters, loss, and tokens or flop")
    if "loss" not in columns:
        raise ValueError(f"{table}: no column loss; a law of the loss needs the loss of every run")

    def number(row: dict[str, str], column: str) -> float:
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            where = f"{table}: line {reader.line_num}, column {column}"
            raise ValueError(f"{where}: {row[column]!r} is no number above 0; mend the cell or leave out the row")
        return value

    found = []
    for row in reader:
        if None in row or None in row.values():
            cells = len(columns) + len(row.get(None, ())) - sum(value is None for value in row.values())
            raise ValueError(f"{table}: line {reader.line_num} has {cells} cells, and the header has {len(columns)}")
        size, loss = number(row, "parameters"), number(row, "loss")
        by_flops = "tokens" not in columns
        count = number(row, "flop") / FLOPS_PER_PARAMETER_AND_TOKEN / size if by_flops else number(row, "tokens")
        found.append(Run(size, count, loss))
    return found


def read_run(folder: Path) -> "Run":
    """Return what the run of a folder came to: its parameters, and tokens and held-out loss of its last evaluation.

    Raises:
        ValueError: it is no run, or has no held-out loss.
    """
    from trimaran.runtime.plan.scaling.figures import Run
    from trimaran.runtime.train.metrics import read_metrics

    if not (folder / "spec.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is no run: spec.yaml or metrics.jsonl is missing; give a run's folder or a table")
    spec = load_spec(folder / "spec.yaml")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if _is_loss(row.get("held_out_loss"))]
    if not rows:
        raise ValueError(
            f"{folder} has no held-out loss, and a law needs that of every run; train it with train.eval_interval and "
            "data.held_out_fraction above 0"
        )
    last = rows[-1]
    return Run(
        float(spec.transformer.num_parameters()), float(last["tokens_seen"] or 0), float(last["held_out_loss"] or 0)
    )


def _is_loss(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _check_spread(runs: Iterable["Run"]) -> None:
    every = list(runs)
    if len(every) < _FEWEST_RUNS:
        raise ValueError(f"a law of five constants needs {_FEWEST_RUNS} runs or more; got {len(every)}")
    for name in ("parameters", "tokens"):
        values = [getattr(run, name) for run in every]
        if max(values) < _LEAST_SPREAD * min(values):
            raise ValueError(
                f"the runs' {name} differ by a factor of {max(values) / min(values):.3g}; a law needs "
                f"{_LEAST_SPREAD:g} or more: add runs with more or fewer {name}"
            )


def _print_best(rule: tuple[float, float], best: Callable[[LossFormula], tuple[float, float]]) -> None:
    """Print the optimum by the rule of 20 tokens a parameter and by each published law.

    Args:
        rule, best: parameters and tokens.
    """
    draws = shipped_draws()
    rows = [_row(f"{TOKENS_PER_PARAMETER:g} tokens a parameter", rule, DEFAULT, draws, None)]
    rows += [_row(law.name, best(law), DEFAULT, draws, best if law is DEFAULT else None) for law in LAWS]
    print_table(_table(DEFAULT, rows))
    most = max(FLOPS_PER_PARAMETER_AND_TOKEN * size * count for size, count in (rule, *map(best, LAWS)))
    if most > _FAR * LARGEST_RUN:
        say(f"{most:.3g} FLOP is {most / LARGEST_RUN:,.0f} times the largest run of both laws: far beyond their fit")
    for each in LAWS:
        say(f"{each.name}: {each.source}" + (f"; {each.note}" if each.note else ""))


def _table(law: LossFormula, rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table

    table = Table("by", "parameters", "tokens", "tokens a parameter", "FLOP", f"loss ({law.name})", box=None)
    for row in rows:
        table.add_row(*row)
    return table


def _row(
    name: str,
    found: tuple[float, float],
    law: LossFormula,
    draws: Draws,
    best: Callable[[LossFormula], tuple[float, float]] | None,
) -> list[str]:
    """Return the cells of parameters and tokens, with the intervals of a law's draws.

    Args:
        law: of the loss.
        best: of each draw; None where the two are no optimum of the law.
    """
    size, count = found
    sizes = counts = None
    if best is not None:
        sizes, counts = interval(draws, lambda each: best(each)[0]), interval(draws, lambda each: best(each)[1])
    compute = FLOPS_PER_PARAMETER_AND_TOKEN * size * count
    losses = interval(draws, lambda each: each.loss(size, count))
    return [
        name, _cell(size, sizes, 3), _cell(count, counts, 3), f"{count / size:.3g}", f"{compute:.3g}",
        _cell(law.loss(size, count), losses, 4),
    ]  # fmt: skip


def _cell(value: float, bounds: tuple[float, float] | None, digits: int) -> str:
    """Return a figure with its interval, if it has one that is wider than its digits."""
    if bounds is None or bounds[0] == bounds[1]:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}g} ({bounds[0]:.{digits}g} to {bounds[1]:.{digits}g})"


def _print_factors(size: float, best: float) -> None:
    from rich.table import Table

    table = Table("tokens over the best", "tokens", "loss", "FLOP over the least for that loss", box=None)
    for factor in _FACTORS:
        count = factor * best
        waste = DEFAULT.waste(size, count)
        table.add_row(f"{factor:g}", f"{count:.3g}", f"{DEFAULT.loss(size, count):.4g}", f"{waste:.3g}")
    print_table(table)
