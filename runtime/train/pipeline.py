"""The pipeline schedule of a run spec, and what its stages cost."""

from trimaran.runtime.pipeline.partition import stage_costs, stage_layers
from trimaran.runtime.pipeline.schedule import Placement, Schedule
from trimaran.runtime.pipeline.schedules import SCHEDULES, build_schedule
from trimaran.runtime.pipeline.simulate import Costs
from trimaran.runtime.spec import RunSpec


def costs_of(spec: RunSpec) -> Costs:
    """Return the times of a microbatch in each stage, in proportion to FLOPs.

    The unit is the forward of one rank's share of the model, if all had equal shares.
    """
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    flops = stage_costs(spec.transformer, spec.train.seq_len, layers)
    forward = [cost * spec.parallel.pp / sum(flops) for cost in flops]
    return Costs.of_stages(forward, [2 * cost for cost in forward])


def placement_of(spec: RunSpec) -> Placement:
    """Return where the stages of the run live while it trains: stage -> pipeline rank."""
    parallel = spec.parallel
    return SCHEDULES[parallel.schedule].placement(parallel.pp, parallel.virtual_stages)


def schedule_of(spec: RunSpec) -> Schedule:
    """Return the training schedule of the run, without communication."""
    parallel = spec.parallel
    return build_schedule(
        parallel.schedule, parallel.pp, spec.num_microbatches, parallel.virtual_stages, costs_of(spec)
    )
