"""Flat buckets: the parameters of whole blocks laid end to end, so that one collective serves many tensors.

A bucket is cut into one slice for each rank of its sharding group. Buckets are in the reverse of the network's order,
which is the order in which the backward pass finishes their gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from trimaran.models.boundary import HEAD
from trimaran.models.parallel.group import Group
from trimaran.models.parallel.parameter import ParameterInfo, info_of
from trimaran.runtime.mesh import Sharding

Blocks = Mapping[str, Mapping[str, nn.Parameter]]
"""Block -> global name -> parameter, in the order of the network."""
EMBEDDING_ROWS = "embedding.weight"
"""The parameter that a tied head shares."""


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


def _segment_key(info: ParameterInfo) -> tuple[bool, bool, float, bool]:
    """Key of a segment: (partial over tp, decay, lr_scale, whether every tp rank holds the parameter whole)."""
    return info.needs_tp_grad_reduce, info.decay, info.init_spec.lr_scale, info.shard.axis is None


@dataclass(frozen=True)
class Segment:
    """A range [start, stop) of a bucket whose parameters share `decay` and `lr_scale`.

    Args:
        counted: this rank adds it to the gradient norm.
        is_partial: its gradients are parts of a sum over tp.
    """

    start: int
    stop: int
    decay: bool
    lr_scale: float
    counted: bool
    is_partial: bool


class Bucket:
    """Flat parameters [length] in their dtype, of which the parameters become views.

    Args:
        parameters: (global name, parameter).
        blocks: the blocks that they belong to.
        sharding: `length` is a multiple of the two groups' sizes.
        is_read_in_backward: whether gradients of inputs depend on the parameters: not on the head, whose forward
            computes the gradient, and not on the rows of the embedding.
        tied: the only parameter is tied to another rank's.

    Attributes:
        kept: the slice that this rank updates.
        stored: the part of `kept` that this rank counts in the gradient norm and stores; replicas have the others.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        blocks: Sequence[str],
        sharding: Sharding,
        tp: Group,
        *,
        is_read_in_backward: bool,
        tied: bool,
    ) -> None:
        first = parameters[0][1]
        self.blocks, self.sharding, self.tied = tuple(blocks), sharding, tied
        self.is_read_in_backward = is_read_in_backward
        # Parameters with equal keys are adjacent, so that the optimizer and the norm work on few long ranges.
        ordered = sorted(parameters, key=lambda item: _segment_key(info_of(item[1])))
        self.slots: list[Slot] = []
        length = 0
        for name, parameter in ordered:
            self.slots.append(Slot(name, parameter, length, length + parameter.numel()))
            length += parameter.numel()
        shard, replica = sharding.shard, sharding.replica
        part = -(-length // (shard.size * replica.size))
        self.length = part * shard.size * replica.size
        start = shard.rank * part * replica.size
        self.kept = slice(start, start + part * replica.size)
        self.stored = slice(start + replica.rank * part, start + (replica.rank + 1) * part)
        self.grad_dtype = torch.promote_types(first.dtype, torch.float32)
        self.params = torch.zeros(self.length, dtype=first.dtype, device=first.device)
        for slot in self.slots:
            flat = self.params[slot.start : slot.stop].view_as(slot.parameter)
            if slot.parameter.untyped_storage().nbytes():
                flat.copy_(slot.parameter.data)
            slot.parameter.data = flat
        self._tp_rank = tp.rank

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose gradients one pass completes together; a tied embedding's rows get theirs in two passes."""
        return len(self.blocks) if self.is_read_in_backward else 1

    def new_grads(self, length: int) -> Tensor:
        """Return zeros [length] for gradients."""
        return torch.zeros(length, dtype=self.grad_dtype, device=self.params.device)

    def attach(self, grads: Tensor | None) -> None:
        """Let the parameters' gradients be added to `grads` [at least length], or nowhere."""
        for slot in self.slots:
            slot.info.main_grad = None if grads is None else grads[slot.start : slot.stop].view_as(slot.parameter)

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
        for (is_partial, decay, lr_scale, _), run in groupby(self.slots, key=lambda slot: _segment_key(slot.info)):
            slots = list(run)
            counted = self.holds(slots[0])
            start, stop = max(slots[0].start, within.start), min(slots[-1].stop, within.stop)
            if start < stop:
                segments.append(Segment(start, stop, decay, lr_scale, counted, is_partial))
        return segments

    def overlaps(self, within: slice) -> Iterator[tuple[Slot, int, int]]:
        """Yield (slot, start, stop) of every slot's overlap with `within`, in elements of the bucket."""
        for slot in self.slots:
            start, stop = max(slot.start, within.start), min(slot.stop, within.stop)
            if start < stop:
                yield slot, start, stop


@dataclass
class _Open:
    """Parameters of one kind that are collected for the next bucket, and their blocks."""

    parameters: list[tuple[str, nn.Parameter]]
    blocks: list[str]
    num_bytes: int = 0


def build_buckets(
    stages: Sequence[Blocks], dp: Sharding, expert_dp: Sharding, tp: Group, *, bucket_bytes: int, tied: bool
) -> Iterator[Bucket]:
    """Yield buckets of whole blocks, of at most `bucket_bytes` of gradients each, in backward order within a stage.

    A block that is larger has its own bucket. The head and the embedding's rows have their own too, for a pass ends
    their gradients at another time than those of the blocks beside them. Experts that only some dp ranks hold have
    others than the rest of their block.

    Args:
        stages: the blocks of each stage of this rank; a tied embedding may be in two of them.
        expert_dp: of the ranks that hold the same experts, for parameters that are cut over ep.
        tied: whether the embedding is tied to another rank's copy: its bucket is then of the same length on both.
    """
    rows = [block for blocks in stages for block, own in blocks.items() if EMBEDDING_ROWS in own]
    for blocks in stages:
        collected = {kind: _Collected(sharding, tp) for kind, sharding in (("plain", dp), ("expert", expert_dp))}
        for block, own in reversed(list(blocks.items())):
            if rows and block == rows[0]:
                weight = [(EMBEDDING_ROWS, own[EMBEDDING_ROWS])]
                yield Bucket(weight, rows, dp, tp, is_read_in_backward=False, tied=tied)
            others = [item for item in own.items() if item[0] != EMBEDDING_ROWS]
            if block == HEAD:
                if others:
                    yield Bucket(others, [block], dp, tp, is_read_in_backward=False, tied=False)
                continue
            for kind, collecting in collected.items():
                chosen = [item for item in others if (info_of(item[1]).shard.axis == "ep") == (kind == "expert")]
                yield from collecting.add(block, chosen, bucket_bytes)
        for collecting in collected.values():
            yield from collecting.close()


class _Collected:
    """Parameters of one kind for the next bucket, in backward order, and their blocks."""

    def __init__(self, sharding: Sharding, tp: Group) -> None:
        self._sharding, self._tp = sharding, tp
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._blocks: list[str] = []
        self._num_bytes = 0

    def add(self, block: str, parameters: Sequence[tuple[str, nn.Parameter]], bucket_bytes: int) -> Iterator[Bucket]:
        """Add a block's parameters; yield the bucket before them where they don't fit in."""
        if not parameters:
            return
        size = sum(p.numel() * torch.promote_types(p.dtype, torch.float32).itemsize for _, p in parameters)
        if self._num_bytes + size > bucket_bytes:
            yield from self.close()
        self._parameters += reversed(parameters)
        self._blocks.append(block)
        self._num_bytes += size

    def close(self) -> Iterator[Bucket]:
        """Yield the bucket of what is collected, and begin anew."""
        if self._parameters:
            yield Bucket(self._parameters, self._blocks, self._sharding, self._tp, is_read_in_backward=True, tied=False)
        self._parameters, self._blocks, self._num_bytes = [], [], 0
