"""The constants that are shipped: fitted by chip and software on published runs, with the errors that were left.

`constants.json` beside this file is data, written by `benchmarks/plan_constants.py` from tests/plan/published.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from trimaran.runtime.files import read_text
from trimaran.runtime.plan.time.constants import Constants

FILE: Final = Path(__file__).with_name("constants.json")
VERSION: Final = 1


class Calibration(BaseModel):
    """Constants of one software on one chip.

    Attributes:
        runs: that they were fitted on.
        gpus: the fewest and the most of those runs.
        median, p90: of |predicted / measured - 1| over them.
        group: of rows that belong together; "" for all of a software on a chip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    software: str
    chip: str
    dtype: str
    group: str
    runs: int
    gpus: tuple[int, int]
    median: float
    p90: float
    constants: dict[str, float]

    def values(self) -> Constants:
        """Return the constants."""
        return Constants(**self.constants)


class Shipped(BaseModel):
    """The whole file.

    Attributes:
        default: of all softwares together, on top of a chip's datasheet.
        left_out: errors of runs that were left out of the fit, by how they were left out: median and shares of runs
            within 10% and 20%.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    source: str
    default: Calibration
    calibrations: list[Calibration]
    left_out: dict[str, tuple[float, float, float]]


def shipped(path: Path = FILE) -> Shipped:
    """Return the shipped constants.

    Raises:
        ValueError: the file is of another version, or none of these.
    """
    try:
        found = Shipped.model_validate_json(read_text(path))
    except ValidationError as error:
        raise ValueError(f"{path} holds no constants of a plan: {error.errors()[0]['msg']}") from error
    if found.version != VERSION:
        raise ValueError(
            f"{path} has version {found.version}; this version of trimaran reads {VERSION}: calibrate anew"
        )
    return found


def softwares(found: Shipped) -> Mapping[str, list[Calibration]]:
    """Return the calibrations by software."""
    return {
        name: [each for each in found.calibrations if each.software == name]
        for name in dict.fromkeys(each.software for each in found.calibrations)
    }


def calibration_for(found: Shipped, software: str | None, chip: str, dtype: str) -> tuple[Calibration, bool]:
    """Return the calibration of a software on a chip, and whether it was made on that chip in that dtype.

    Where the software was calibrated on others alone, that with the most runs is taken; None takes the default.

    Raises:
        ValueError: the software is not known.
    """
    if software is None:
        return found.default, False
    known = softwares(found)
    if software not in known:
        nearest = difflib.get_close_matches(software, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"software {software!r} is not known; the nearest is {nearest!r}, of {', '.join(known)}")
    of_chip = [each for each in known[software] if each.chip == chip and (each.dtype == "fp8") == (dtype == "fp8")]
    best = max(of_chip or known[software], key=lambda each: each.runs)
    return best, bool(of_chip)
