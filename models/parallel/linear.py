"""Column- and row-parallel linear layers of Megatron-LM (Shoeybi et al. 2019, section 3).

    column: y_r = x W_r^T          W [out, in] is cut along out; the output is cut; dx = sum_r dy_r W_r
    row:    y = sum_r x_r W_r^T    W is cut along in; the input is cut

With sequence parallelism (Korthikanti et al. 2022) the column's input and the row's output are cut along the sequence.
The matrix product adds the weight gradient to `main_grad` itself, in its dtype: no rounding, no temporary, no second
pass over memory. The all_reduce of the input gradient runs meanwhile.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.models.parallel.collectives import (
    gather_dim1,
    reduce_from_tp_region,
    reduce_scatter_dim1,
    reduce_scatter_to_sequence_region,
)
from trimaran.models.parallel.gradient import GradAccumulator, weight_gradients
from trimaran.models.parallel.group import Group, start_all_reduce
from trimaran.models.parallel.parameter import InitSpec, LayerContext, new_parameter


def _add_weight_gradients(
    gradients: Sequence[GradAccumulator], dys: Sequence[Tensor], x: Tensor, group: Group | None
) -> None:
    """Add dy^T x for each of dys [rows, out]. x: [..., in]; with a group this rank's part of the sequence."""
    # Gathered again: keeping the whole from the forward, or until a W, would cost what sequence parallelism saves.
    rows = (x if group is None else gather_dim1(x, group)).flatten(0, -2)
    for gradient, dy in zip(gradients, dys, strict=True):
        gradient.add_product(dy.t(), rows)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b; the weight may have a leading dim of parts."""
    if weight.ndim > 2:
        weight, bias = weight.view(-1, x.shape[-1]), None if bias is None else bias.view(-1)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Several linear maps of one input. `group` is None where the input gradient needs no communication."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group | None, sequence_parallel: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[0::2], parameters[1::2]
        ctx.group, ctx.weights, ctx.sequence_parallel = group, weights, sequence_parallel and group is not None
        ctx.save_for_backward(x)
        full = gather_dim1(x, group) if group is not None and sequence_parallel else x
        return tuple(
            [_product(full, weight, bias) for weight, bias in zip(weights, biases, strict=True) if weight is not None]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        group: Group | None = ctx.group
        dys = [dy.flatten(0, -2) for dy in grads]
        weights = [weight.view(-1, x.shape[-1]) for weight in ctx.weights]
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(*grads[0].shape[:-1], x.shape[-1])
        if group is not None and not ctx.sequence_parallel:
            wait = start_all_reduce(dx, group)
        add = partial(_add_weight_gradients, dys=dys, x=x, group=group if ctx.sequence_parallel else None)
        parameter_grads: list[Tensor | None] = []
        for index, (dy, weight, found) in enumerate(
            zip(dys, ctx.weights, weight_gradients(ctx.weights, add), strict=True)
        ):
            parameter_grads.append(found)
            needs_bias = ctx.needs_input_grad[4 + 2 * index]
            parameter_grads.append(dy.sum(0).view(weight.shape[:-1]) if needs_bias else None)
        if ctx.sequence_parallel:
            assert group is not None
            dx = reduce_scatter_dim1(dx, group)
        elif group is not None:
            wait()
        return dx, None, None, *parameter_grads


class ColumnParallelLinear(nn.Module):
    """y_r = x W_r^T + b_r with the outputs cut over tp.

    Args:
        out_features: global; must be divisible by tp where `parts` > 1.
        parts: matrices stacked in one weight [parts, out_features, in_features], each cut along its outputs (keys and
            values; gate and up). With 1 part the weight is [out_features, in_features].
        is_whole: every rank holds the whole weight and computes all outputs, but uses only its own part of them, so
            that its gradient is a part of the sum over tp.
        unit: outputs that must stay on one rank, such as those of a head.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: LayerContext,
        *,
        bias: bool,
        init_spec: InitSpec,
        parts: int = 1,
        is_whole: bool = False,
        unit: int = 1,
    ) -> None:
        super().__init__()
        leading = (parts,) if parts > 1 else ()
        dim = None if is_whole else len(leading)
        self.context = context
        cut: dict[str, Any] = {"dim": dim, "needs_tp_grad_reduce": is_whole, "unit": unit}
        self.weight = new_parameter((*leading, out_features, in_features), context, init_spec=init_spec, **cut)
        self.bias = None
        if bias:
            self.bias = new_parameter((*leading, out_features), context, init="zeros", decay=False, **cut)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, seq, parts * out_features / tp] for x [batch, local seq, in]."""
        return column_linear(x, [self])[0]


class ColumnParallelWeights(Protocol):
    """The part of a layer that `column_linear` reads; a tied output projection has it too."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    context: LayerContext


def column_linear(x: Tensor, layers: Sequence[ColumnParallelWeights]) -> tuple[Tensor, ...]:
    """Return each layer's output for one input x [batch, local seq, in]; one collective for all input gradients."""
    context = layers[0].context
    if not torch.is_grad_enabled():  # in generation autograd's bookkeeping takes as long as a small product
        full = gather_dim1(x, context.tp) if context.sequence_parallel else x
        return tuple([_product(full, layer.weight, layer.bias) for layer in layers])
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    group = context.tp if context.tp.size > 1 else None
    return _Linear.apply(x, group, context.sequence_parallel, *parameters)  # type: ignore[no-untyped-call, no-any-return]


class RowParallelLinear(nn.Module):
    """y = sum_r x_r W_r^T + b with the inputs cut over tp; the bias is added once, after the sum.

    Args:
        unit: inputs that must stay on one rank, such as those of a head.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: LayerContext,
        *,
        bias: bool,
        init_spec: InitSpec,
        unit: int = 1,
    ) -> None:
        super().__init__()
        self.context = context
        self.weight = new_parameter((out_features, in_features), context, dim=1, init_spec=init_spec, unit=unit)
        is_partial = context.sequence_parallel
        self.bias = (
            new_parameter((out_features,), context, init="zeros", decay=False, needs_tp_grad_reduce=is_partial)
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, local seq, out] for x [batch, seq, in / tp]."""
        return row_linear([(x, self)])


def row_linear(inputs: Sequence[tuple[Tensor, RowParallelLinear]]) -> Tensor:
    """Return the sum of the layers' outputs [batch, local seq, out], each for its own input, in one collective.

    inputs: [batch, seq, in / tp] each.
    """
    context = inputs[0][1].context
    combine = reduce_scatter_to_sequence_region if context.sequence_parallel else reduce_from_tp_region
    if torch.is_grad_enabled():
        first, *others = [_Linear.apply(x, None, False, layer.weight, None)[0] for x, layer in inputs]  # type: ignore[no-untyped-call]
    else:
        first, *others = [F.linear(x, layer.weight) for x, layer in inputs]
    for other in others:
        first = first + other
    y: Tensor = combine(first, context.tp)
    for _, layer in inputs:
        if layer.bias is not None:
            y = y + layer.bias
    return y
