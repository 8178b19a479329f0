"""Flat buckets: parameters and their gradients laid end to end, so that one collective serves many tensors.

A bucket is cut into `dp` equal slices; dp rank r owns slice r. For experts that only some dp ranks hold, `dp` is the
group of those. Parameters are in the reverse of their order in the network, which is the order in which the backward
pass finishes their gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from trimaran.models.parallel.group import Group
from trimaran.models.parallel.parameter import ParameterInfo, info_of


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter in a bucket: elements [start, stop) of the flat buffers."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def info(self) -> ParameterInfo:
        """The parameter's record."""
        return info_of(self.parameter)


def _segment_key(info: ParameterInfo) -> tuple[bool, float, bool]:
    """Key of a segment: (decay, lr_scale, whether every tp rank holds the parameter whole)."""
    return info.decay, info.init_spec.lr_scale, info.shard.axis is None


@dataclass(frozen=True)
class Segment:
    """A range [start, stop) of a bucket whose parameters share `decay` and `lr_scale`.

    `counted`: this rank adds it to the gradient norm.
    """

    start: int
    stop: int
    decay: bool
    lr_scale: float
    counted: bool


class Bucket:
    """Flat parameters [length] in their dtype and flat gradients [length] in `grad_dtype`; length is a multiple of dp.

    The parameters' data become views of the flat buffer, their `main_grad` views of the gradients.

    Attributes:
        needs_tp_grad_reduce: the gradients are partial sums over tp.
        tied: the bucket's only parameter is tied to another stage's.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        dp: Group,
        tp: Group,
        grad_dtype: torch.dtype,
        *,
        tied: bool = False,
    ) -> None:
        first = parameters[0][1]
        self.dp = dp
        self.needs_tp_grad_reduce, self.tied = info_of(first).needs_tp_grad_reduce, tied
        # Parameters with equal keys are adjacent, so that the optimizer and the norm work on few long ranges.
        ordered = sorted(parameters, key=lambda item: _segment_key(info_of(item[1])))
        self.slots: list[Slot] = []
        length = 0
        for name, parameter in ordered:
            self.slots.append(Slot(name, parameter, length, length + parameter.numel()))
            length += parameter.numel()
        length = -(-length // dp.size) * dp.size
        self.params = torch.zeros(length, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(length, dtype=grad_dtype, device=first.device)
        self.owned = slice(length // dp.size * dp.rank, length // dp.size * (dp.rank + 1))
        for slot in self.slots:
            flat = self.params[slot.start : slot.stop].view_as(slot.parameter)
            flat.copy_(slot.parameter.data)
            slot.parameter.data = flat
            slot.info.main_grad = self.grads[slot.start : slot.stop].view_as(slot.parameter)
        self._tp_rank = tp.rank

    def holds(self, slot: Slot) -> bool:
        """Whether this rank counts and stores the slot, as its copies on other tp ranks or stages do not."""
        replica = slot.info.shard.axis is None and self._tp_rank > 0
        return not replica and not slot.info.tied_copy

    def segments(self, within: slice) -> list[Segment]:
        """The ranges of equal keys inside `within`, in order.

        They have the same bounds on every tp rank: the last bits of AdamW depend on where a tensor ends, and replicas
        must stay equal.
        """
        segments: list[Segment] = []
        for (decay, lr_scale, _), run in groupby(self.slots, key=lambda slot: _segment_key(slot.info)):
            slots = list(run)
            counted = self.holds(slots[0])
            start, stop = max(slots[0].start, within.start), min(slots[-1].stop, within.stop)
            if start < stop:
                segments.append(Segment(start, stop, decay, lr_scale, counted))
        return segments

    def overlaps(self, within: slice) -> Iterator[tuple[Slot, int, int]]:
        """Yield (slot, start, stop) of every slot's overlap with `within`, in elements of the bucket."""
        for slot in self.slots:
            start, stop = max(slot.start, within.start), min(slot.stop, within.stop)
            if start < stop:
                yield slot, start, stop


def build_buckets(
    parameters: Sequence[tuple[str, nn.Parameter]],
    dp: Group,
    expert_dp: Group,
    tp: Group,
    *,
    grad_dtype: torch.dtype,
    bucket_bytes: int,
    tied: bool,
) -> list[Bucket]:
    """Return buckets of at most `bucket_bytes` of gradients each, in backward order; a larger parameter has its own.

    Args:
        parameters: (global name, parameter) in the order of the network, of one stage.
        expert_dp: the ranks that hold the same experts, for parameters that are cut over ep.
        tied: whether the embedding is tied to another rank's copy: it then has its own bucket, of the same length on
            both.
    """
    buckets: list[Bucket] = []

    def kind(item: tuple[str, nn.Parameter]) -> str:
        info = info_of(item[1])
        if tied and (info.tied_copy or item[0] == "embedding.weight"):
            return "tied"
        if info.shard.axis == "ep":
            return "expert"
        return "partial" if info.needs_tp_grad_reduce else "plain"

    for wanted in ("plain", "partial", "expert", "tied"):
        replicas = expert_dp if wanted == "expert" else dp
        pending: list[tuple[str, nn.Parameter]] = []
        size = 0
        for item in reversed([item for item in parameters if kind(item) == wanted]):
            item_bytes = item[1].numel() * grad_dtype.itemsize
            if pending and size + item_bytes > bucket_bytes:
                buckets.append(Bucket(pending, replicas, tp, grad_dtype, tied=wanted == "tied"))
                pending, size = [], 0
            pending.append(item)
            size += item_bytes
        if pending:
            buckets.append(Bucket(pending, replicas, tp, grad_dtype, tied=wanted == "tied"))
    return buckets
