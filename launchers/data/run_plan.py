"""The plan that a run starts with: what is known of this machine, three lines, and `plan.json`. Imports no torch."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trimaran.launchers.terminal import say
from trimaran.runtime.files import read_text, write_text
from trimaran.runtime.plan.brief import FILE, Place, brief_of, lines_of, read_brief, size, warning_of
from trimaran.runtime.processes import free_memory_bytes
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.chips import Chip, Peak

_DRIVER: Final = Path("/proc/driver/nvidia/gpus")
_CONTEXT_BYTES: Final = 3 * 2**29  # as the planner's, of a GPU's context
_NIC_RATE: Final = 400e9 / 8  # between nodes, where nothing is said
_PUBLISHED = "by what published softwares have in common"


def tell_plan(spec: RunSpec, folder: Path, chip: "Chip | Machine | None" = None) -> None:
    """Print the plan of a run in three lines, a warning where it doesn't fit, and keep it in the run's folder.

    Args:
        chip: what the user has named; None: what this machine is, as far as that is known.
    """
    place = place_of(spec, chip)
    if chip is not None:
        place = replace(place, peak=_peak_of(chip, spec.precision.dtype))
        _tell_peak(spec, place, chip.name)
    brief = brief_of(spec, place)
    for line in lines_of(spec, brief):
        say(line)
    warning = warning_of(spec, brief, place)
    if warning is not None:
        say(warning, style="yellow")
    write_text(folder / FILE, brief.model_dump_json(indent=1))


def with_plan(problem: str, folder: Path) -> str:
    """Return an error of a run; of a rank that was killed, with what its plan says of memory, in a sentence.

    A rank that has met the error itself ends it with the table of planned and measured.
    """
    brief = read_brief(folder) if "out of memory, perhaps" in problem else None
    if brief is None or not brief.memory:
        return problem
    planned = size(sum(brief.memory[brief.fullest].values()))
    limit = "" if brief.rank_bytes is None else f" of the {size(brief.rank_bytes)} that a rank may take"
    return f"{problem}; planned were {planned}{limit}"


def place_of(spec: RunSpec, chip: "Chip | Machine | None") -> Place:
    """Return what is known of the machine, with the time of a step on it."""
    from trimaran.runtime.plan.chips import Chip, find_chip

    if isinstance(chip, Chip):
        return _on_gpu(spec, chip)
    if chip is not None:
        return _on_machine(spec, chip)
    name = gpu_name()
    if spec.launcher.device != "cpu" and (name is not None or spec.launcher.device == "cuda"):
        known = None if name is None else find_chip(name)
        if known is not None:
            return _on_gpu(spec, known)
        what = name or "the GPU"
        return Place(what, None, _CONTEXT_BYTES, why_no_time=f"{what} is not known; give --chip NAME or a calibration")
    free = free_memory_bytes()
    ranks = max(1, spec.world_size // spec.launcher.nodes)
    return Place(
        "this machine", None if free is None else free / ranks, None,
        why_no_time="this CPU is not calibrated: trimaran calibrate --output FILE, then --chip FILE",
    )  # fmt: skip


def gpu_name(driver: Path = _DRIVER) -> str | None:
    """Return the product name of this host's first GPU, as NVIDIA's driver tells it; None where there is none."""
    for file in sorted(driver.glob("*/information")):
        try:
            found = re.search(r"^Model:\s*(.+?)\s*$", read_text(file, errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found.group(1)
    return None


def _peak_of(chip: "Chip | Machine", dtype: str) -> "Peak | None":
    """Return the peak of a chip that the user has named; None where it has none in this dtype, as a CPU."""
    from trimaran.runtime.plan.chips import Chip, Peak

    if isinstance(chip, Chip):
        flops = chip.peak(dtype)
        return None if flops is None else Peak.of(chip.name, flops, dtype, chip.source)
    own = next((each for each in chip.constants if each.dtype == dtype), None)
    if chip.kind != "gpu" or own is None:
        return None
    what = "the datasheet, by the" if own.is_datasheet else "the fastest product of the"
    return Peak.of(chip.name, own.flops, dtype, f"{what} calibration of {chip.date[:10]}")


def _tell_peak(spec: RunSpec, place: Place, named: str) -> None:
    """Say that the MFU is a share of another chip's peak, where the user has named another than this machine's GPU."""
    from trimaran.runtime.plan.chips import find_chip

    here = None if spec.launcher.device == "cpu" else gpu_name()
    if here is None or place.peak is None or here == named:
        return
    known, meant = find_chip(here), find_chip(named)
    if known is None or meant is None or known.name != meant.name:
        is_known = "" if known is not None else ", whose peak isn't known"
        say(
            f"--chip {named}: MFU is a share of {place.peak.words}, and this machine's GPU is {here}{is_known}",
            style="yellow",
        )


def _on_gpu(spec: RunSpec, chip: "Chip") -> Place:
    from trimaran.runtime.plan.forecast import Setting, plan

    gpus = max(1, spec.world_size // spec.launcher.nodes)
    setting = Setting(chip, None, _NIC_RATE, gpus, None, None, 1.0, 50_700.0, 300.0, 1e10)
    limits = (f"{chip.name} {_PUBLISHED}", float(chip.memory_bytes), float(_CONTEXT_BYTES))
    try:
        found = plan(spec, setting)
    except ValueError as error:
        return Place(*limits, why_no_time=str(error))
    return Place(*limits, found.seconds, found.error, found.parts)


def _on_machine(spec: RunSpec, machine: "Machine") -> Place:
    from trimaran.runtime.plan.on_machine import plan_on

    ranks = max(1, spec.world_size // spec.launcher.nodes)
    each = machine.memory_bytes / (ranks if machine.kind == "cpu" else 1)
    limits = (machine.name, each, float(machine.context_bytes))
    try:
        found = plan_on(spec, machine)
    except ValueError as error:
        return Place(*limits, why_no_time=str(error))
    return Place(*limits, found.seconds, found.error, found.parts)
