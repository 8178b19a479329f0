"""A published chip by its name, or a machine that `trimaran calibrate` has measured: `--chip`. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.chips import Chip


def chip_at(name: str) -> "tuple[Chip | None, Machine | None]":
    """Return the chip of a name, or the machine in a file; the other is None.

    Raises:
        ValueError: there is no such chip, or the file is no calibration.
        OSError: the file can't be read.
    """
    if is_file(name):
        from trimaran.runtime.plan.calibrate.record import read_machine

        return None, read_machine(Path(name))
    from trimaran.runtime.plan.chips import chip_named

    return chip_named(name), None


def is_file(name: str) -> bool:
    """Whether the value of such an option stands for a file and not for something that is shipped."""
    return name.endswith(".json") or "/" in name
