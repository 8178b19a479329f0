"""The plan of a spec: what its ranks will hold, what a step will take, and what the whole run comes to. No torch.

Memory is that of this runtime: the state to the byte, what layers keep times what the schedule's list holds at most.
Step time is a calibration's: that of a software, or the default of all that are published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.pipeline.action import ActionKind
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.pipeline.simulate import Costs, simulate
from trimaran.runtime.plan.cases import Case, Cases
from trimaran.runtime.plan.chips import Chip
from trimaran.runtime.plan.goodput import daly, goodput, mean_time_between_failures, simulated_goodput, young
from trimaran.runtime.plan.memory.saved import can_count, layer_bytes, stage_bytes
from trimaran.runtime.plan.memory.state import state_of
from trimaran.runtime.plan.time.calibrations import Calibration, calibration_for, shipped
from trimaran.runtime.plan.time.step import StepTime, step_time
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of, schedule_of

CONTEXT_BYTES: Final = 3 * 2**29
"""Of the device's context and of libraries' buffers: 1.5 GiB."""
_CHUNK_BYTES, _CHUNK_ROWS = 2**27, 1024  # of logits that the head computes at once, on a GPU
_MOST_SIMULATED: Final = 4_000  # forwards whose list is simulated; of more the closed form is taken
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
        ValueError: the software is unknown, the spec's ZeRO is DeepSpeed's, or its schedule file is no schedule.
    """
    memory = [_memory(spec, rank) for rank in range(spec.parallel.pp)]
    held = _activations(spec)
    for rank, parts in enumerate(memory):
        parts["activations"] = held[rank]
    fullest = max(range(len(memory)), key=lambda rank: sum(memory[rank].values()))
    calibration, is_of_chip = calibration_for(shipped(), setting.software, setting.chip.name, "bfloat16")
    time = step_time(Cases.of([case_of(spec, setting)]), calibration.values())
    pipelined, bubble = _pipelined(spec, time)
    seconds = pipelined + float(time.tail[0])
    parts = {name: float(value[0]) for name, value in time.parts.items()}
    parts["bubble"] = seconds - sum(value for name, value in parts.items() if name != "bubble")
    few, many = calibration.gpus
    inside = setting.software is None or (is_of_chip and few / 2 <= spec.world_size <= 2 * many)
    figures = _figures(spec, setting, seconds, state_bytes=_stored(spec))
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
        nic_rate=setting.nic_rate,
        flops=chip.flops,
        memory_rate=chip.memory_rate,
        link_rate=chip.link_rate,
        processors=chip.processors,
    )


def _memory(spec: RunSpec, rank: int) -> dict[str, float]:
    state = state_of(spec, rank)
    parts: dict[str, float] = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "in transit": state.gradient_buffers + state.gathered,
    }
    logits, work = _logits(spec) if placement_of(spec)[-1] == rank else 0.0, _work(spec)
    # The loss is over before the backward pass of the first layer begins.
    parts["logits"] = logits if logits > work else 0.0
    parts["working set"] = 0.0 if logits > work else work
    parts["context"] = float(CONTEXT_BYTES)
    return parts


def _logits(spec: RunSpec) -> float:
    """Return the bytes of the head's chunk of logits, with a quarter of it for what the loss keeps."""
    tokens = spec.train.micro_batch_size * spec.train.seq_len
    row = spec.transformer.padded_vocab_size(spec.parallel.tp) / spec.parallel.tp * _ITEM[spec.precision.dtype]
    return 1.25 * min(tokens * row, max(_CHUNK_BYTES, _CHUNK_ROWS * row))


def _work(spec: RunSpec) -> float:
    """Return the bytes beside the microbatches' while a layer's backward pass runs.

    Gradients of the inner outputs and of two streams; where the layer is computed again, all that it keeps.
    """
    tokens, config = spec.train.micro_batch_size * spec.train.seq_len, spec.transformer
    inner = (2 if config.is_gated else 1) * config.ffn_hidden_size / spec.parallel.tp
    again = layer_bytes(spec, recomputed=False, selective=False) if spec.train.recompute_every else 0
    return again + float(tokens * _ITEM[spec.precision.dtype] * (inner + 2 * config.hidden_size))


def _activations(spec: RunSpec) -> list[float]:
    """Return by pipeline rank the most bytes that microbatches keep, by the list that will be executed."""
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    kept = [float(stage_bytes(spec, held)) for held in layers]
    spec = _shortened(spec)
    none = [0.0] * len(kept)
    held = {
        ActionKind.F: kept, ActionKind.B: [-each for each in kept],
        ActionKind.I: none, ActionKind.W: [-each for each in kept],
    }  # fmt: skip
    return simulate(schedule_of(spec), Costs(Costs.uniform(len(kept)).times, held)).peak_held


def _shortened(spec: RunSpec) -> RunSpec:
    """Return the spec with no more microbatches than fill its pipeline several times over, for its peak is the same."""
    parallel, train = spec.parallel, spec.train
    most = 4 * parallel.pp
    if parallel.schedule_file is not None or spec.num_microbatches <= most:
        return spec
    batch = most * train.micro_batch_size * parallel.dp
    return spec.model_copy(update={"train": train.model_copy(update={"global_batch_size": batch})})


def _pipelined(spec: RunSpec, time: StepTime) -> tuple[float, float]:
    """Return the seconds of the pipeline and the share of them in which a rank waits, by simulation of the list."""
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    every = spec.train.recompute_every
    passes = 3.0 + (1 / every if every else 0.0)
    transfer = float(time.transfer[0]) / spec.parallel.virtual_stages
    busy = []
    for stage, held in enumerate(layers):
        is_last = stage == spec.num_stages - 1
        chip = len(held) * float(time.layer[0]) + (float(time.head[0]) if is_last else 0.0)
        busy.append(max(chip, (len(held) + is_last) * float(time.host[0])) + transfer)
    short = spec if spec.num_stages * spec.num_microbatches <= _MOST_SIMULATED else _shortened(spec)
    forward = [1e3 * each / passes for each in busy]
    backward = [1e3 * each * (passes - 1) / passes for each in busy]
    found = simulate(schedule_of(short), Costs.of_stages(forward, backward, forward))
    by_rank = [0.0] * spec.parallel.pp
    for rank, each in zip(placement_of(spec), busy, strict=True):
        by_rank[rank] += each
    more = spec.num_microbatches - short.num_microbatches
    seconds = found.makespan / 1e3 + more * max(by_rank)
    return seconds, 1 - sum(by_rank) / len(by_rank) * spec.num_microbatches / seconds


def _stored(spec: RunSpec) -> float:
    """Return the bytes of a checkpoint's tensors: main parameters and two moments, each element once."""
    wide = max(4, _ITEM[spec.precision.dtype])
    return 3.0 * wide * spec.transformer.num_parameters()


def _figures(spec: RunSpec, setting: Setting, seconds: float, state_bytes: float) -> dict[str, float]:
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
