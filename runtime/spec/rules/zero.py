"""Rules of what the data-parallel ranks share out."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, nearest_divisors, one_of
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
