"""Differentiable collectives: Megatron-LM's pairs of a forward and a backward communication.

Shoeybi et al. 2019, section 3; sequence parallelism: Korthikanti et al. 2022, section 4.2.

                                         forward         | backward
    reduce_from_tp_region                all_reduce      | identity
    reduce_scatter_to_sequence_region    reduce_scatter  | all_gather
    sum_over_group                       all_reduce      | all_reduce (each rank computes something else from the sum)
    copy_to_tp_region                    identity        | all_reduce
      with sequence parallelism          all_gather      | reduce_scatter
    all_to_all                           all_to_all      | all_to_all

`linear.column_linear` contains copy_to_tp_region, to overlap its communication with the weight gradient. The sequence
is dim 1 of [batch, seq, hidden]. Over a group of one rank each is the identity.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimaran.models.parallel import group as plain
from trimaran.models.parallel.group import Group, all_gather, all_reduce, reduce_scatter


def gather_dim1(x: Tensor, group: Group) -> Tensor:
    """Return all ranks' parts [batch, seq / size, ...] concatenated along dim 1 [batch, seq, ...], without autograd."""
    if group.size == 1:
        return x
    parts = all_gather(x, group)  # [size, batch, seq / size, ...]
    return parts.transpose(0, 1).flatten(1, 2)


def reduce_scatter_dim1(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part along dim 1 of the sum over ranks [batch, seq / size, ...], without autograd.

    x: [batch, seq, ...].
    """
    if group.size == 1:
        return x
    return reduce_scatter(x.unflatten(1, (group.size, -1)).transpose(0, 1), group)


def local_dim1(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of x [batch, seq, ...] along dim 1."""
    return x if group.size == 1 else x.chunk(group.size, dim=1)[group.rank]


class _ReduceFromTPRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceScatterToSequenceRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_dim1(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return gather_dim1(grads[0], ctx.group), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _CopyToTPRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return gather_dim1(x, group) if sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        if ctx.sequence_parallel:
            return reduce_scatter_dim1(grads[0], ctx.group), None, None
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather_dim1(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return local_dim1(grads[0], ctx.group).contiguous(), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return plain.all_to_all(x.contiguous(), sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return plain.all_to_all(grads[0].contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def copy_to_tp_region(x: Tensor, group: Group, *, sequence_parallel: bool) -> Tensor:
    """Return the input of a tp region [batch, seq, ...], in which each rank computes a part of a sum.

    x: [batch, seq, ...]; with sequence parallelism this rank's part of the sequence.
    """
    return x if group.size == 1 else _CopyToTPRegion.apply(x, group, sequence_parallel)  # type: ignore[no-untyped-call]


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Return the whole sequence [batch, seq, ...], with which all ranks compute the same, of parts along dim 1."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Return the rows that other ranks send to this one; arguments as in `group.all_to_all`."""
    return x if group.size == 1 else _AllToAll.apply(x, sent, received, group)  # type: ignore[no-untyped-call]


def sum_over_group(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group, from which each rank computes something else; gradients are summed too."""
    return x if group.size == 1 else _SumOverGroup.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_tp_region(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group, in place; the gradient of x is that of the sum."""
    return x if group.size == 1 else _ReduceFromTPRegion.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_scatter_to_sequence_region(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of the sequence of the sum of x over the group."""
    return x if group.size == 1 else _ReduceScatterToSequenceRegion.apply(x, group)  # type: ignore[no-untyped-call]
