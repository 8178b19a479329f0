"""The plan of a spec: what its ranks will hold, what a step will take, and what the whole run comes to. No torch.

Memory is that of this runtime: the state to the byte, what layers keep times what the schedule's list holds at most.
Step time is a calibration's: that of a software, or the default of all that are published.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.pipeline.simulate import Costs, Span, simulate
from trimaran.runtime.plan.cases import Case, Cases
from trimaran.runtime.plan.chips import Chip
from trimaran.runtime.plan.goodput import daly, goodput, mean_time_between_failures, simulated_goodput, young
from trimaran.runtime.plan.memory.ranks import memory_of, shortened
from trimaran.runtime.plan.memory.saved import can_count
from trimaran.runtime.plan.time.calibrations import Calibration, calibration_for, shipped
from trimaran.runtime.plan.time.step import StepTime, step_time
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of, schedule_of

_ITEM: Final = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, beside the spec.

    Attributes:
        software: whose calibration; None: the default of all.
        nic_rate: bytes a second, a GPU and direction, between nodes.
        gpus_per_node: GPUs that the fast links join.
        price: of a GPU-hour; None: no money.
        watts: of a GPU with its share of the node; None: the chip's.
        pue: energy of the whole site over that of its computers.
        hours_per_failure: GPU-hours between two failures.
        restart: seconds from a failure to the next step.
        write_rate: bytes a second at which all ranks together write a checkpoint.
        measured: constants of this chip that `trimaran calibrate` has found, in place of a software's.
    """

    chip: Chip
    software: str | None
    nic_rate: float
    gpus_per_node: int
    price: float | None
    watts: float | None
    pue: float
    hours_per_failure: float
    restart: float
    write_rate: float
    measured: Calibration | None = None


@dataclass(frozen=True)
class Plan:
    """What was planned.

    Attributes:
        memory: by pipeline rank, bytes by part.
        fullest: the pipeline rank that holds most.
        exact: whether the state and the layers are counted to the byte.
        seconds: of a step.
        parts: of it, by what it goes to.
        bubble: share of the pipeline's time in which a rank does not compute.
        error: p90 of the published runs that the calibration was fitted on; None: outside of them.
        figures: of the whole run, by name.
    """

    memory: list[dict[str, float]]
    fullest: int
    exact: bool
    seconds: float
    parts: Mapping[str, float]
    bubble: float
    calibration: Calibration
    error: float | None
    figures: Mapping[str, float]

    def total(self, rank: int) -> float:
        """Return the bytes of a pipeline rank."""
        return sum(self.memory[rank].values())


def plan(spec: RunSpec, setting: Setting) -> Plan:
    """Return the plan of a spec.

    Raises:
        ValueError: the software is unknown, the spec's ZeRO is DeepSpeed's, its schedule file is no schedule, or the
            chip has no bfloat16.
    """
    if spec.precision.dtype == "bfloat16" and not setting.chip.has_bfloat16:
        raise ValueError(f"{setting.chip.name} has no bfloat16; set precision.dtype to float16")
    memory = memory_of(spec)
    fullest = max(range(len(memory)), key=lambda rank: sum(memory[rank].values()))
    time, calibration, is_of_chip = _step(spec, setting)
    pipelined, bubble = _pipelined(spec, time)
    seconds = pipelined + float(time.tail[0])
    parts = {name: float(value[0]) for name, value in time.parts.items()}
    parts["bubble"] = seconds - sum(value for name, value in parts.items() if name != "bubble")
    few, many = calibration.gpus
    inside = setting.software is None or (is_of_chip and few / 2 <= spec.world_size <= 2 * many)
    figures = figures_of(spec, setting, seconds, state_bytes=stored_bytes(spec))
    return Plan(
        memory, fullest, can_count(spec.transformer), seconds, parts, bubble, calibration,
        calibration.p90 if inside else None, figures,
    )  # fmt: skip


def case_of(spec: RunSpec, setting: Setting) -> Case:
    """Return the case of a spec on a chip."""
    model, parallel, chip = spec.transformer, spec.parallel, setting.chip
    counts = [0] * parallel.pp
    layers = stage_layers(model, spec.train.seq_len, spec.num_stages, parallel.layers_per_stage)
    for rank, held in zip(placement_of(spec), layers, strict=True):
        counts[rank] += len(held)
    every = spec.train.recompute_every
    return Case(
        layers=model.num_layers,
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
        gated=float(model.is_gated),
        tied=float(model.ties_head),
        seq=spec.train.seq_len,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=1,
        dp=parallel.dp,
        ep=parallel.ep,
        virtual_stages=parallel.virtual_stages,
        sequence_parallel=float(parallel.sequence_parallel),
        zero=spec.zero.stage,
        batch=spec.train.global_batch_size,
        microbatch=spec.train.micro_batch_size,
        gpus_per_node=setting.gpus_per_node,
        recompute=1 / every if every else 0.0,
        selective=float(spec.train.recompute == "selective"),
        unfused=0.0,
        overlap=1.0,
        gradient_bytes=4.0,
        experts=model.num_experts,
        experts_per_token=model.experts_per_token if model.num_experts else 1,
        first_layers=counts[0],
        last_layers=counts[placement_of(spec)[-1]],
        most_layers=max(counts),
        reductions={"parallel": 3.0, "parallel_one_norm": 2.0}.get(model.block, 4.0),
        nic_rate=setting.nic_rate,
        flops=chip.flops,
        memory_rate=chip.memory_rate,
        link_rate=chip.link_rate,
        processors=chip.processors,
    )


def timeline(spec: RunSpec, setting: Setting) -> list[Span]:
    """Return what each pipeline rank does in a step, in milliseconds, of as many microbatches as show its shape.

    Raises:
        ValueError: as `plan`.
    """
    return simulate(schedule_of(shortened(spec)), _costs(spec, _busy(spec, _step(spec, setting)[0]))).spans


def _step(spec: RunSpec, setting: Setting) -> tuple[StepTime, Calibration, bool]:
    calibration, is_of_chip = setting.measured, True
    if calibration is None:
        calibration, is_of_chip = calibration_for(shipped(), setting.software, setting.chip.name, "bfloat16")
    return step_time(Cases.of([case_of(spec, setting)]), calibration.values()), calibration, is_of_chip


def _busy(spec: RunSpec, time: StepTime) -> list[float]:
    """Return the seconds of a microbatch in each stage, forward and backward, with its transfer."""
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    transfer = float(time.transfer[0]) / spec.parallel.virtual_stages
    busy = []
    for stage, held in enumerate(layers):
        is_last = stage == spec.num_stages - 1
        chip = len(held) * float(time.layer[0]) + (float(time.head[0]) if is_last else 0.0)
        busy.append(max(chip, (len(held) + is_last) * float(time.host[0])) + transfer)
    return busy


def _costs(spec: RunSpec, busy: Sequence[float]) -> Costs:
    every = spec.train.recompute_every
    passes = 3.0 + (1 / every if every else 0.0)
    forward = [1e3 * each / passes for each in busy]
    return Costs.of_stages(forward, [each * (passes - 1) for each in forward], forward)


def _pipelined(spec: RunSpec, time: StepTime) -> tuple[float, float]:
    """Return the seconds of the pipeline and the share of them in which a rank waits, by simulation of the list."""
    busy, short = _busy(spec, time), shortened(spec)
    found = simulate(schedule_of(short), _costs(spec, busy))
    by_rank = [0.0] * spec.parallel.pp
    for rank, each in zip(placement_of(spec), busy, strict=True):
        by_rank[rank] += each
    more = spec.num_microbatches - short.num_microbatches
    seconds = found.makespan / 1e3 + more * max(by_rank)
    return seconds, 1 - sum(by_rank) / len(by_rank) * spec.num_microbatches / seconds


def stored_bytes(spec: RunSpec) -> float:
    """Return the bytes of a checkpoint's tensors: main parameters and two moments, each element once."""
    wide = max(4, _ITEM[spec.precision.dtype])
    return 3.0 * wide * spec.transformer.num_parameters()


def figures_of(spec: RunSpec, setting: Setting, seconds: float, state_bytes: float) -> dict[str, float]:
    """Return what a run of such steps comes to, by name."""
    tokens = spec.train.global_batch_size * spec.train.seq_len
    gpus, steps = spec.world_size, spec.train.num_steps
    rate = tokens / seconds
    flops = spec.transformer.flops_per_token(spec.train.seq_len)
    again = spec.transformer.num_layers * spec.transformer.layer_forward_flops(spec.train.seq_len)
    every = spec.train.recompute_every
    peak = gpus * setting.chip.flops
    save = state_bytes / setting.write_rate
    mtbf = mean_time_between_failures(gpus, setting.hours_per_failure)
    interval = daly(save, mtbf)
    good = goodput(interval, save, setting.restart, mtbf)
    busy = seconds * steps
    hours = busy / 3600 * gpus
    watts = setting.watts if setting.watts is not None else setting.chip.watts
    figures = {
        "tokens a second": rate,
        "MFU": rate * flops / peak,
        "HFU": rate * (flops + (again / every if every else 0.0)) / peak,
        "days": busy / 86400,
        "GPU-hours": hours,
        "MWh": hours * watts * setting.pue / 1e6,
        "checkpoint bytes": state_bytes,
        "seconds of a save": save,
        "failures": busy / mtbf,
        "seconds between saves (Young)": young(save, mtbf),
        "seconds between saves (Daly)": interval,
        "goodput": good,
        "goodput, simulated": simulated_goodput(interval, save, setting.restart, mtbf),
        "days with failures": busy / 86400 / good if good > 0 else float("inf"),
    }
    return figures if setting.price is None else {**figures, "money": hours * setting.price}
