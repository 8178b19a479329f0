"""A software's constants from a table of its runs, with the errors of the runs and of those left out. No torch."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trimaran.runtime.files import read_text
from trimaran.runtime.plan.published.accuracy import shares
from trimaran.runtime.plan.published.tables import PublishedRun, read_table
from trimaran.runtime.plan.time.calibrations import Calibration, shipped
from trimaran.runtime.plan.time.constants import Constants
from trimaran.runtime.plan.time.fit import Measured, fit

VERSION: Final = 1
_FOLDS: Final = 5
FEWEST: Final = 3
"""Runs below which twelve constants would only repeat the default."""


@dataclass(frozen=True)
class SoftwareFit:
    """Constants of one software on one chip in one dtype.

    Attributes:
        in_sample, left_out: median of |predicted / measured - 1|, and shares of runs within 10% and 20%; the second
            None where there are too few runs to leave some out.
    """

    calibration: Calibration
    in_sample: tuple[float, float, float]
    left_out: tuple[float, float, float] | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**self.calibration.model_dump(), "in_sample": self.in_sample, "left_out": self.left_out}


class _Fitted(Calibration):
    in_sample: tuple[float, float, float]
    left_out: tuple[float, float, float] | None


class _Fits(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    fits: list[_Fitted]


def fit_software(path: Path) -> list[SoftwareFit]:
    """Return the constants of every software, chip and dtype of a table, around the shipped default.

    Raises:
        ValueError: the table is broken, a group has too few timed runs, or none has any.
        OSError: it can't be read.
    """
    groups: dict[tuple[str, str, str], list[PublishedRun]] = defaultdict(list)
    for run in read_table(path):
        if run.cases and run.seconds > 0:
            groups[(run.stack, run.chip, run.dtype)].append(run)
    if not groups:
        raise ValueError(f"{path} has no run with a layout and seconds (sec_per_iter); a fit needs {FEWEST} of a chip")
    few = next((key for key, runs in groups.items() if len(runs) < FEWEST), None)
    if few is not None:
        raise ValueError(
            f"{path} has {len(groups[few])} runs of {few[0] or 'a software without a name'} on {few[1]} in {few[2]}; a "
            f"fit needs at least {FEWEST}"
        )
    default = shipped().default.values()
    return [_fit(key, runs, default) for key, runs in groups.items()]


def calibration_in(path: Path, chip: str, dtype: str) -> Calibration:
    """Return the constants for a chip and dtype of a file that `trimaran calibrate --fit --output` has written.

    Raises:
        ValueError: the file is none of these, or of another version, or has no constants for that chip; names those
            that it has.
        OSError: it can't be read.
    """
    try:
        found = _Fits.model_validate_json(read_text(path))
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"])) or "its content"
        raise ValueError(
            f"{path} holds no constants of trimaran calibrate --fit ({where}: {what['msg']}); give such a file, or the "
            "name of a software"
        ) from error
    if found.version != VERSION:
        raise ValueError(f"{path} has version {found.version}, and this trimaran reads {VERSION}; fit anew")
    of_chip = [each for each in found.fits if each.chip == chip and (each.dtype == "fp8") == (dtype == "fp8")]
    if not of_chip:
        known = ", ".join(dict.fromkeys(each.chip for each in found.fits)) or "none"
        raise ValueError(f"{path} has no constants of {chip}, but of {known}; give --chip, or fit runs on {chip}")
    if len(of_chip) > 1:
        several = ", ".join(each.software for each in of_chip)
        raise ValueError(f"{path} has constants of several softwares on {chip} ({several}); fit one alone")
    return Calibration(**of_chip[0].model_dump(exclude={"in_sample", "left_out"}))


def fits_as_json(fits: Sequence[SoftwareFit]) -> dict[str, Any]:
    """Return what `calibration_in` reads."""
    return {"version": VERSION, "fits": [each.as_json() for each in fits]}


def _fit(key: tuple[str, str, str], runs: list[PublishedRun], default: Constants) -> SoftwareFit:
    constants = fit(Measured(runs), default)
    errors = Measured(runs).log_errors(constants)
    sizes, gpus = np.abs(np.expm1(errors)), [run.gpus for run in runs]
    calibration = Calibration(
        software=key[0], chip=key[1], dtype=key[2], group="", runs=len(runs), gpus=(min(gpus), max(gpus)),
        median=round(float(np.median(sizes)), 4), p90=round(float(np.quantile(sizes, 0.9)), 4),
        constants={name: float(f"{value:.6g}") for name, value in vars(constants).items()},
    )  # fmt: skip
    return SoftwareFit(calibration, shares(errors), _left_out(runs, default))


def _left_out(runs: list[PublishedRun], default: Constants) -> tuple[float, float, float] | None:
    """Return the errors of runs that a fit on the others predicts; a model's runs are left out together."""
    folds: dict[int, list[PublishedRun]] = defaultdict(list)
    models = sorted({run.model for run in runs}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    by_model = len(models) >= 2
    for number, run in enumerate(runs):
        folds[models.index(run.model) % _FOLDS if by_model else number % _FOLDS].append(run)
    errors = []
    for left in folds.values():
        lines = {run.line for run in left}
        rest = [run for run in runs if run.line not in lines]
        if not rest:
            return None
        errors.append(Measured(left).log_errors(fit(Measured(rest), default)))
    return shares(np.concatenate(errors))
