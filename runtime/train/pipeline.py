"""The pipeline schedule of a run spec, and what its stages cost."""

from pathlib import Path

from trimaran.models.fields import counted
from trimaran.runtime.files import read_text
from trimaran.runtime.pipeline.action import ActionKind, actions_of
from trimaran.runtime.pipeline.csv_text import read_csv
from trimaran.runtime.pipeline.partition import stage_costs, stage_layers
from trimaran.runtime.pipeline.schedule import Placement, Schedule
from trimaran.runtime.pipeline.schedules import SCHEDULES, build_schedule
from trimaran.runtime.pipeline.simulate import Costs
from trimaran.runtime.spec import RunSpec

_ENTRY_BYTES, _SPARE_BYTES = 64, 1 << 16  # of an action with its separators; of waits, which a text may list


def costs_of(spec: RunSpec) -> Costs:
    """Return the times of a microbatch in each stage, in proportion to FLOPs.

    The unit is the forward of one rank's share of the model, if all had equal shares.
    """
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    flops = stage_costs(spec.transformer, spec.train.seq_len, layers)
    forward = [cost * spec.parallel.pp / sum(flops) for cost in flops]
    every = spec.train.recompute_every
    again = [sum(index % every == 0 for index in each) / len(each) if every else 0.0 for each in layers]
    backward = [(2 + share) * cost for cost, share in zip(forward, again, strict=True)]
    return Costs.of_stages(forward, backward, forward)


def placement_of(spec: RunSpec) -> Placement:
    """Return where the stages of the run live while it trains: stage -> pipeline rank. Raises as `schedule_of`."""
    parallel = spec.parallel
    if parallel.schedule_file is not None:
        return schedule_of(spec).placement
    return SCHEDULES[parallel.schedule].placement(parallel.pp, parallel.virtual_stages)


def schedule_of(spec: RunSpec) -> Schedule:
    """Return the training schedule of the run, without communication.

    Raises:
        ValueError, OSError: parallel.schedule_file can't be read, is no schedule, or is one of another shape.
    """
    parallel = spec.parallel
    if parallel.schedule_file is not None:
        return _schedule_of_file(spec, Path(parallel.schedule_file))
    return build_schedule(
        parallel.schedule, parallel.pp, spec.num_microbatches, parallel.virtual_stages, costs_of(spec)
    )


def _schedule_of_file(spec: RunSpec, file: Path) -> Schedule:
    name = f"parallel.schedule_file {file}"
    try:
        most = _ENTRY_BYTES * 3 * spec.num_stages * spec.num_microbatches + _SPARE_BYTES
        text = read_text(file, most, errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{name} can't be read: {reason}; give a CSV file of a schedule of this shape") from error
    schedule = read_csv(text, name)
    actions = [action for entries in schedule.actions for action in actions_of(entries)]
    if all(action.kind is ActionKind.F for action in actions):
        raise ValueError(f"{name} has forwards alone; a training schedule has a B, or an I and a W, for each")
    if spec.zero.backend == "deepspeed" and any(action.kind is ActionKind.W for action in actions):
        raise ValueError(
            f"{name} computes weight gradients (W) apart from the backward pass, where DeepSpeed takes them; "
            "use one with whole backwards (B), or set zero.backend to native"
        )
    found = _shape(schedule.num_ranks, schedule.num_stages, 1 + max(action.microbatch for action in actions))
    wanted = _shape(spec.parallel.pp, spec.num_stages, spec.num_microbatches)
    if found != wanted:
        raise ValueError(
            f"{name} has {found}, but the spec has {wanted} (parallel.pp, times parallel.virtual_stages; "
            "train.global_batch_size / (micro_batch_size * dp)); change one to the other"
        )
    return schedule


def _shape(ranks: int, stages: int, microbatches: int) -> str:
    return f"{counted(ranks, 'rank')}, {counted(stages, 'stage')} and {counted(microbatches, 'microbatch', 'es')}"
