"""Rules of what the data-parallel ranks share out."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, nearest_divisors, one_of
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


@RULES.needs("zero.shard_size", "zero.stage")
def _shares_hold_something(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    size = spec.zero.shard_size
    if size is not None and spec.zero.stage == 0:
        rule = f"shard_size ({size}) is for stages that share something out, and zero.stage is 0"
        fix = "set zero.shard_size to null, or zero.stage to 1 or more"
        yield FieldError("zero.shard_size", rule, size, fix)


@RULES.needs("zero.shard_size", "parallel.dp", may_read=("parallel.ep",))
def _shares_fill_dp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    size, dp, ep = spec.zero.shard_size, spec.parallel.dp, getattr(spec.parallel, "ep", 1)
    if size is None:
        return
    sizes = [each for each in nearest_divisors(dp, size, count=2**31) if each % ep == 0 or ep % each == 0]
    fix = f"set zero.shard_size to {one_of([*sizes, 'null'])}"
    if dp % size:
        yield FieldError("zero.shard_size", f"shard_size ({size}) must divide dp ({dp})", size, fix)
    elif size % ep and ep % size:
        rule = f"one of shard_size ({size}) and ep ({ep}) must divide the other, for both group consecutive dp ranks"
        yield FieldError("zero.shard_size", rule, size, fix)


@RULES.needs("zero.offload", "zero.backend")
def _who_offloads(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.zero.offload != "none" and spec.zero.backend == "native":
        rule = f"offload {spec.zero.offload} is DeepSpeed's alone, and zero.backend is native"
        fix = "set zero.offload to none, or zero.backend to deepspeed"
        yield FieldError("zero.offload", rule, spec.zero.offload, fix)


_NATIVE: Final = "or zero.backend to native"


@RULES.needs("zero.backend", "zero.stage", "parallel.pp")
def _stages_of_deepspeed(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.zero.backend == "native":
        return
    stage, pp = spec.zero.stage, spec.parallel.pp
    if stage == 0:
        rule = "backend deepspeed has stages 1 to 3: with 0 nothing is shared out, which the native backend does"
        yield FieldError("zero.stage", rule, stage, f"set zero.stage to 1, 2 or 3, {_NATIVE}")
    if stage == 3 and pp > 1:
        rule = f"DeepSpeed's stage 3 deadlocks in a pipeline, and pp is {pp}"
        yield FieldError("zero.stage", rule, stage, f"set zero.stage to 1 or 2, parallel.pp to 1, {_NATIVE}")


@RULES.needs("zero.backend", "zero.shard_size")
def _shares_of_deepspeed(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    size = spec.zero.shard_size
    if spec.zero.backend == "deepspeed" and size is not None:
        rule = f"with backend deepspeed all dp ranks share out the state, got {size}"
        yield FieldError("zero.shard_size", rule, size, f"set zero.shard_size to null, {_NATIVE}")


@RULES.needs("zero.backend", "parallel.ep")
def _experts_with_deepspeed(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    ep = spec.parallel.ep
    if spec.zero.backend == "deepspeed" and ep > 1:
        rule = f"with zero.backend deepspeed every dp rank must hold all experts (ep 1), got {ep}"
        yield FieldError("parallel.ep", rule, ep, f"set parallel.ep to 1, {_NATIVE}")


@RULES.needs("zero.backend", "parallel.schedule", "parallel.schedule_file")
def _schedules_with_deepspeed(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.parallel.schedule
    if spec.zero.backend == "native" or spec.parallel.schedule_file is not None:
        return
    if SCHEDULES[schedule].splits_backward:
        whole = one_of(name for name, row in SCHEDULES.items() if not row.splits_backward)
        rule = f"schedule {schedule} computes weight gradients apart from the backward pass, where DeepSpeed takes them"
        yield FieldError("parallel.schedule", rule, schedule, f"set parallel.schedule to {whole}, {_NATIVE}")


@RULES.needs("zero.backend", "precision.dtype")
def _dtypes_of_deepspeed(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    dtype = spec.precision.dtype
    if spec.zero.backend == "deepspeed" and dtype == "float64":
        rule = "DeepSpeed keeps weights and optimizer state in float32, so float64 would be lost"
        yield FieldError("precision.dtype", rule, dtype, f"set precision.dtype to float32 or bfloat16, {_NATIVE}")
