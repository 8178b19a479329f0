"""A plan by what was measured on a machine: a GPU's constants in the published formulas, or a step on processors."""

from dataclasses import replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.calibrate.fitted import seconds_of
from trimaran.runtime.plan.calibrate.processor_step import ProcessorStep, processor_step, threads_of
from trimaran.runtime.plan.calibrate.record import ChipConstants, Machine, Rates
from trimaran.runtime.plan.chips import Chip, find_chip
from trimaran.runtime.plan.forecast import Plan, Setting, figures_of, plan, stored_bytes
from trimaran.runtime.plan.memory.ranks import memory_of
from trimaran.runtime.plan.memory.saved import can_count
from trimaran.runtime.plan.time.calibrations import Calibration, calibration_for, shipped
from trimaran.runtime.spec import RunSpec

_DEFAULTS: Final = (None, 400e9 / 8, 8, None, None, 1.0, 50_700.0, 300.0, 1e10)
OURS: Final = "trimaran"
MEASURED: Final = "measured"
"""Group of a calibration that was made on the chip itself."""


def plan_on(spec: RunSpec, machine: Machine, setting: Setting | None = None) -> Plan:
    """Return the plan of a spec on a calibrated machine.

    Args:
        setting: of prices, failures and rates; its chip is not read.

    Raises:
        ValueError: the calibration is of a CPU and the run is one on GPUs, or the reverse; or it lacks what the run
            needs: the dtype, an exchange, a rank's threads, the other nodes.
    """
    check_kind(spec, machine)
    chip = chip_of(machine, spec)
    setting = Setting(chip, *_DEFAULTS) if setting is None else replace(setting, chip=chip)
    if machine.kind == "gpu":
        return plan(spec, replace(setting, measured=constants_of_gpu(spec, machine, setting.software)))
    if setting.software is not None:
        raise ValueError(
            f"--software {setting.software} was calibrated on GPUs, and --chip is of {machine.name}; leave one out"
        )
    step = processor_step(spec, machine)
    memory = [{**parts, "context": float(machine.context_bytes)} for parts in memory_of(spec)]
    fullest = max(range(len(memory)), key=lambda rank: sum(memory[rank].values()))
    figures = figures_of(spec, setting, step.seconds, state_bytes=stored_bytes(spec))
    if setting.watts is None:
        figures.pop("MWh")  # nobody has measured what the processors take
    calibration = _of_processors(machine, step)
    return Plan(
        memory, fullest, can_count(spec.transformer), step.seconds, step.parts, step.bubble, calibration,
        calibration.p90, figures,
    )  # fmt: skip


def check_kind(spec: RunSpec, machine: Machine) -> None:
    """Raise ValueError where a calibration of a CPU is given for a run on GPUs, or the reverse."""
    wish, on_slurm = spec.launcher.device, spec.launcher.kind == "slurm" and spec.slurm.gpus_per_node > 0
    if wish == "cpu" and machine.kind == "gpu":
        raise ValueError(f"the calibration is of a GPU, {machine.name}, and launcher.device is cpu; give a CPU's")
    if machine.kind == "cpu" and (wish == "cuda" or (wish == "auto" and on_slurm)):
        field = "launcher.device is cuda" if wish == "cuda" else "slurm.gpus_per_node asks for GPUs"
        raise ValueError(f"the calibration is of a CPU, {machine.name}, and {field}; give one of the GPU")


def chip_of(machine: Machine, spec: RunSpec) -> Chip:
    """Return a calibrated machine as a chip: one GPU, or a rank's share of the processors and of the memory.

    Raises:
        ValueError: the run's dtype was not measured.
    """
    known, date = find_chip(machine.name), f"calibrated on {machine.date[:10]}"
    if machine.kind == "gpu":
        own = _constants_of(machine, spec.precision.dtype)
        return Chip(
            machine.name, "(?!)", own.flops, None, machine.memory_bytes, own.memory_rate, machine.processors,
            own.link_rate, known.watts if known is not None else 0.0, date,
        )  # fmt: skip
    ranks, threads = spec.world_size // spec.launcher.nodes, threads_of(spec, machine)
    rates = min(machine.rates_of(spec.precision.dtype), key=lambda each: abs(each.threads - threads))
    return Chip(
        machine.name, "(?!)", rates.flops, None, machine.memory_bytes // max(1, ranks), rates.memory_rate, threads, 0.0,
        0.0, date,
    )  # fmt: skip


def _constants_of(machine: Machine, dtype: str) -> ChipConstants:
    found = next((each for each in machine.constants if each.dtype == dtype), None)
    if found is None:
        known = ", ".join(each.dtype for each in machine.constants)
        raise ValueError(
            f"precision.dtype is {dtype}, and the calibration of {machine.name} has {known}; calibrate anew with "
            f"--dtype {dtype}"
        )
    return found


def constants_of_gpu(spec: RunSpec, machine: Machine, software: str | None) -> Calibration:
    """Return the measured constants, with a published software's for what one machine does not tell."""
    own = _constants_of(machine, spec.precision.dtype)
    base, _ = calibration_for(shipped(), software, machine.name, "bfloat16")
    of_chip = ("gemm", "half_depth", "hbm", "attention", "link", "link_latency")
    taken = {name: own.constants[name] for name in own.measured if software is None or name in of_chip}
    worst = max(own.residuals.values())
    ranks = max((each.ranks for each in machine.exchanges), default=1)
    return base.model_copy(
        update={
            "software": software or OURS, "chip": machine.name, "dtype": own.dtype, "group": MEASURED, "runs": 0,
            "gpus": (1, ranks), "median": worst, "p90": worst, "constants": {**base.constants, **taken},
        }
    )  # fmt: skip


def _of_processors(machine: Machine, step: ProcessorStep) -> Calibration:
    errors = _step_errors(machine, step.rates)
    ranks = max((each.ranks for each in machine.exchanges), default=1)
    return Calibration(
        software=OURS, chip=machine.name, dtype=step.rates.dtype, group=MEASURED, runs=len(errors), gpus=(1, ranks),
        median=float(np.median(errors)), p90=float(np.quantile(errors, 0.9)), constants={},
    )  # fmt: skip


def _step_errors(machine: Machine, rates: Rates) -> list[float]:
    """Return |fitted / measured - 1| of the small models' steps that the rates were fitted on."""
    own = [each for each in machine.rates if each.dtype == rates.dtype]
    nearest = min(own, key=lambda each: abs(each.threads - rates.threads))
    steps = [
        each for each in machine.points
        if each.what == "step" and (each.dtype, each.ranks, each.threads)
        == (nearest.dtype, nearest.ranks, nearest.threads)
    ]  # fmt: skip
    return [abs(seconds_of(nearest, each) / each.taken - 1) for each in steps] or [nearest.residuals["step"]]
