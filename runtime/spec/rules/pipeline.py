"""Rules of the pipeline's stages, schedule and microbatches."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, at_most, nearest_multiples, one_of
from trimaran.runtime.grid import num_microbatches
from trimaran.runtime.pipeline.schedule import microbatches_fill_groups
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


@RULES.needs("parallel.pp", "parallel.virtual_stages", "model.num_layers")
def _layers_fill_stages(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    pp, virtual_stages, layers = spec.parallel.pp, spec.parallel.virtual_stages, shape.num_layers
    if layers < spec.num_stages:
        stages = f"pp ({pp}) * virtual_stages ({virtual_stages}) = {spec.num_stages} stages"
        rule = f"num_layers ({layers}) must be at least {stages}, one layer a stage"
        fix = f"set model.num_layers to {spec.num_stages} or more"
        if layers >= virtual_stages:
            fix += f", or parallel.pp to {at_most(layers // virtual_stages)}"
        if virtual_stages > 1 and layers >= pp:
            fix += f", or parallel.virtual_stages to {at_most(layers // pp)}"
        yield FieldError("parallel.pp", rule, pp, fix)


@RULES.needs("parallel.layers_per_stage", "parallel.pp", "parallel.virtual_stages")
def _layers_per_stage_length(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and len(layers) != spec.num_stages:
        stages = f"pp ({spec.parallel.pp}) * virtual_stages ({spec.parallel.virtual_stages}) = {spec.num_stages}"
        rule = f"layers_per_stage must have {stages} entries, got {len(layers)}"
        fix = f"write {spec.num_stages} numbers, or null to balance them by cost"
        yield FieldError("parallel.layers_per_stage", rule, layers, fix)


@RULES.needs("parallel.layers_per_stage", "model.num_layers")
def _layers_per_stage_sum(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and sum(layers) != shape.num_layers:
        total = f"{' + '.join(map(str, layers))} = {sum(layers)}" if len(layers) <= 16 else f"the sum {sum(layers)}"
        rule = f"layers_per_stage must add up to num_layers ({shape.num_layers}), got {total}"
        change = shape.num_layers - sum(layers)
        fix = f"{'add' if change > 0 else 'take away'} {abs(change)}, or write null to balance them by cost"
        yield FieldError("parallel.layers_per_stage", rule, layers, fix)


@RULES.needs("parallel.virtual_stages", "parallel.schedule", "parallel.schedule_file")
def _virtual_stages_fit_schedule(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    virtual_stages, schedule = spec.parallel.virtual_stages, spec.parallel.schedule
    wanted = SCHEDULES[schedule].virtual_stages if spec.parallel.schedule_file is None else None
    if wanted not in (None, virtual_stages):
        others = [name for name, row in SCHEDULES.items() if row.virtual_stages in (None, virtual_stages)]
        rule = f"schedule {schedule} needs virtual_stages {wanted}, got {virtual_stages}"
        fix = f"set parallel.virtual_stages to {wanted}, or parallel.schedule to {one_of(others)}"
        yield FieldError("parallel.schedule", rule, schedule, fix)


_MOST_FORWARDS: Final = 1 << 20  # of a step: the list of a schedule is held and proved whole, on every rank
_BATCH: Final = ("train.global_batch_size", "train.micro_batch_size", "parallel.dp")


@RULES.needs("parallel.virtual_stages", "parallel.pp", "parallel.schedule", "parallel.schedule_file", *_BATCH)
def _microbatches_fit_schedule(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp, pp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp, spec.parallel.pp
    count, row = num_microbatches(batch, micro, dp), SCHEDULES[spec.parallel.schedule]
    if count is None or spec.parallel.schedule_file is not None:
        return
    made_of = f"num_microbatches ({count}) = global_batch_size ({batch}) / (micro_batch_size ({micro}) * dp ({dp}))"
    fewest = row.fewest_microbatches(pp)
    if row.in_groups and not microbatches_fill_groups(count, pp, spec.parallel.virtual_stages):
        rule = f"{made_of} must be divisible by pp ({pp}) with virtual_stages above 1"
        sizes = one_of(each * micro * dp for each in nearest_multiples(pp, count))
        yield FieldError("train.global_batch_size", rule, batch, f"set train.global_batch_size to {sizes}")
    elif count < fewest:
        rule = f"{made_of} must be at least {fewest} = 2 * pp ({pp}) with schedule {spec.parallel.schedule}"
        fix = f"set train.global_batch_size to {fewest * micro * dp} or more"
        yield FieldError("train.global_batch_size", rule, batch, fix)


@RULES.needs("parallel.virtual_stages", "parallel.pp", *_BATCH)
def _schedule_is_bounded(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp
    count = num_microbatches(batch, micro, dp) or 0
    if count * spec.num_stages > _MOST_FORWARDS:
        rule = f"num_microbatches ({count:,}) * {spec.num_stages} stages must be at most {_MOST_FORWARDS:,}"
        most = _MOST_FORWARDS // spec.num_stages * micro * dp
        yield FieldError("train.global_batch_size", rule, batch, f"set train.global_batch_size to {at_most(most)}")


@RULES.needs(*_BATCH)
def _batch_divides(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp
    if num_microbatches(batch, micro, dp) is None:
        product = f"micro_batch_size ({micro}) * num_microbatches * dp ({dp})"
        rule = f"global_batch_size ({batch}) must be {product}, a multiple of {micro} * {dp} = {micro * dp}"
        fix = f"set train.global_batch_size to {one_of(nearest_multiples(micro * dp, batch))}"
        yield FieldError("train.global_batch_size", rule, batch, fix)
