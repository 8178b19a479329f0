"""`trimaran calibrate`: measure this machine, fit its constants, and write or compare the file of both."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.calibration import calibrate_as_rank, calibrate_here
from trimaran.launchers.cli.common.console import errors_as_sentences, path
from trimaran.launchers.cli.planning.plan import check_folders
from trimaran.launchers.env.rank_env import is_rank
from trimaran.launchers.terminal import print_table, say
from trimaran.runtime.files import write_text

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine

_DTYPES = ("float32", "bfloat16", "float64")
_MOST_RANKS = 64


def calibrate(
    output: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write the calibration into this file.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Show what has changed since this calibration.")
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="RUNS.CSV", help="Fit a software's constants on a table of runs instead."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Ranks that measure together; by default one for each GPU or core. srun, mpirun and torchrun say it.",
        ),
    ] = None,
    dtype: Annotated[
        list[str], typer.Option(metavar="DTYPE", help="float32, bfloat16 or float64; may be repeated.")
    ] = ["float32", "bfloat16"],  # noqa: B006
    smoke: Annotated[bool, typer.Option("--smoke", hidden=True)] = False,
) -> None:
    """Measure this machine in less than three minutes: products, copies, attention, layers, and exchanges of ranks."""
    with errors_as_sentences():
        check_folders({"--output": output})
        if fit is not None:
            if compare is not None or ranks is not None:
                raise ValueError("--fit measures nothing; give --compare and --ranks without it")
            _fit(fit, output)
            return
        _check(ranks, dtype, gpus=count_gpus())
        before = None if compare is None else _read(compare)
        if output is not None:
            check_writable("--output", output.absolute().parent)
        dtypes = list(dict.fromkeys(dtype))

        def conclude(found: "Machine") -> None:
            if output is not None:
                write_text(output, found.model_dump_json(indent=1) + "\n")
            _print(found)
            if before is not None:
                _print_drift(before, found)
            if output is not None:
                say(f"calibration written to {output}: trimaran plan SPEC --chip {output}")

        if is_rank(os.environ):
            if ranks is not None or output is None:
                raise ValueError(
                    "under another launcher, which says how many ranks there are, give no --ranks, and an --output "
                    "whose folder all ranks can write"
                )
            calibrate_as_rank(output, dtypes, conclude, smoke=smoke)
        conclude(calibrate_here(_ranks_of_machine() if ranks is None else ranks, dtypes, smoke=smoke))


def count_gpus(devices: Path = Path("/dev")) -> int:
    """Return the GPUs of this machine."""
    return len(list(devices.glob("nvidia[0-9]*")))


def _check(ranks: int | None, dtypes: Sequence[str], gpus: int) -> None:
    if ranks is not None and not 1 <= ranks <= _MOST_RANKS:
        raise ValueError(f"--ranks must be from 1 to {_MOST_RANKS}; got {ranks}")
    if ranks is not None and gpus and ranks > gpus:
        raise ValueError(
            f"--ranks {ranks}: this machine has {gpus} GPUs, and two ranks share none; give {gpus} at most"
        )
    wrong = [each for each in dtypes if each not in _DTYPES]
    if wrong:
        raise ValueError(f"--dtype {wrong[0]}: give one of {', '.join(_DTYPES)}")


def _read(file: Path) -> "Machine":
    from trimaran.runtime.plan.calibrate.record import read_machine

    return read_machine(file)


def _ranks_of_machine() -> int:
    """Return the GPUs of this machine, or its cores, eight at most."""
    from trimaran.runtime.processes import usable_cores

    return min(8, count_gpus() or usable_cores())


def _print(found: "Machine") -> None:
    from rich.table import Table

    where = "cores" if found.kind == "cpu" else "processors"
    say(
        f"{found.name}, {found.cores if found.kind == 'cpu' else found.processors} {where}: {len(found.points)} points "
        f"in {found.seconds:.0f} s, spread {found.spread:.1%}"
    )
    table = Table("fitted", "ranks x threads", "value", "error of the fit", box=None)
    for each in found.rates:
        where = f"{each.dtype}, {each.ranks} x {each.threads}"
        for name, value in (
            ("products", f"{each.flops * each.gemm / 1e9:.1f} GFLOP/s"),
            ("attention", f"{each.flops * each.attention / 1e9:.1f} GFLOP/s"),
            ("copies", f"{each.memory_rate * each.hbm / 1e9:.1f} GB/s"),
            ("layer's host time", f"{each.host * 1e6:.0f} us"),
        ):
            kind = {"products": "product", "attention": "attention", "layer's host time": "step"}.get(name, "")
            table.add_row(name, where, value, f"{each.residuals[kind]:.1%}" if kind else "")
    for one in found.constants:
        for name, number in one.constants.items():
            table.add_row(name, one.dtype, f"{number:.4g}", "")
        for kind, error in one.residuals.items():
            table.add_row(f"error: {kind}", one.dtype, "", f"{error:.1%}")
    for pair in found.exchanges:
        what = f"{pair.operation} over {pair.axis}"
        value = f"{pair.latency * 1e6:.0f} us + {pair.rate / 1e9:.2f} GB/s"
        where = f"{pair.ranks} ranks" + (f", {pair.nodes} nodes" if pair.nodes > 1 else "")
        table.add_row(what, where, value, f"{pair.residual:.1%}")
    print_table(table)
    from trimaran.runtime.plan.calibrate.costs import rate_between_nodes

    rate = rate_between_nodes(found.exchanges)
    if rate is not None:
        gbits = 8 * rate / 1e9
        say(f"between nodes: {gbits:.3g} Gbit/s a rank and direction; trimaran plan takes it as --nic {gbits:.3g}")
    from trimaran.runtime.plan.calibrate.record import MOST_SPREAD

    if found.spread > MOST_SPREAD:
        say(
            f"the spread is above {MOST_SPREAD:.0%}: the machine did other things meanwhile, and trimaran plan refuses "
            "such a calibration; run it again while nothing else does",
            style="yellow",
        )


def _print_drift(before: "Machine", now: "Machine") -> None:
    from rich.table import Table

    from trimaran.runtime.plan.calibrate.compare import drift

    found = drift(before, now)
    table = Table("changed since", before.date[:10], "now", "ratio", box=None)
    for row in found.rows:
        table.add_row(row.what, f"{row.before:.4g}", f"{row.now:.4g}", f"{row.ratio:.2f}")
    print_table(table)
    for note in found.notes:
        say(note, style="yellow")


def _fit(runs: Path, output: Path | None) -> None:
    """Fit a software's constants on a table of runs, and print the errors in the sample and left out."""
    import json

    from rich.table import Table

    from trimaran.runtime.plan.calibrate.software import fit_software, fits_as_json

    found = fit_software(runs)
    table = Table("software", "chip", "runs", "median error", "within 10%", "left out: median", "within 10%", box=None)
    for each in found:
        left = ("", "") if each.left_out is None else (f"{each.left_out[0]:.1%}", f"{each.left_out[1]:.0%}")
        inside = (f"{each.in_sample[0]:.1%}", f"{each.in_sample[1]:.0%}")
        calibration = each.calibration
        table.add_row(calibration.software, calibration.chip, str(calibration.runs), *inside, *left)
    print_table(table)
    if output is not None:
        write_text(output, json.dumps(fits_as_json(found), indent=1) + "\n")
        say(f"constants written to {output}: trimaran plan SPEC --chip {found[0].calibration.chip} --software {output}")
