"""Column- and row-parallel linear layers of Megatron-LM (Shoeybi et al. 2019, section 3).

    column: y_r = x W_r^T          W [out, in] is cut along out; the output is cut; dx = sum_r dy_r W_r
    row:    y = sum_r x_r W_r^T    W is cut along in; the input is cut

With sequence parallelism (Korthikanti et al. 2022) the column's input and the row's output are cut along the sequence.
The matrix product adds the weight gradient to `main_grad` itself, in its dtype: no rounding, no temporary, no second
pass over memory. The all_reduce of the input gradient runs meanwhile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from trimaran.models.parallel.low_rank import LowRank, LowRankCall, LowRankCalls
from trimaran.models.parallel.packed import packed_product
from trimaran.models.parallel.parameter import InitSpec, LayerContext, new_parameter
from trimaran.models.parallel.quantized import QuantizedWeight, dense


@dataclass(frozen=True, eq=False)
class _Map:
    """One of the linear maps of one input: x W^T + b, and what an adapter adds to it.

    Args:
        weight: [out, in], or with a leading dim of parts.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    adapter: LowRankCall | None

    def of(self, full: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the output [..., parts * out] for the whole input [..., in]; hidden: that of its adapter."""
        y = _product(full, dense(self.weight), self.bias)
        if self.adapter is not None and hidden is not None:
            self.adapter.add_(y, hidden)
        return y

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, A and B; None for what is not there, or no parameter."""
        weight = self.weight if isinstance(self.weight, Tensor) else None
        return weight, self.bias, *((None, None) if self.adapter is None else self.adapter.parameters)


def _outputs(maps: Sequence[_Map], full: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the maps' outputs for the whole input [..., in], and the hidden rows of their adapters."""
    adapters = _adapters_of(maps)
    if adapters is None:
        return tuple([each.of(full, None) for each in maps]), None
    hidden = adapters.hidden(full)
    return tuple([each.of(full, low) for each, low in zip(maps, adapters.split(hidden), strict=True)]), hidden


def _adapters_of(maps: Sequence[_Map]) -> LowRankCalls | None:
    """Return the adapters of the maps, None where there is none."""
    calls = [each.adapter for each in maps]
    return None if all(call is None for call in calls) else LowRankCalls(calls)


@dataclass(frozen=True, eq=False)
class _Gradients:
    """What the gradients of the maps' parameters are computed from, now or later.

    Args:
        x: [..., in]; with a group this rank's part of the sequence.
        dys: for each map the gradient of its output [rows, out].
        learns: for each map whether its weight learns.
        hidden, dh: the hidden rows of the adapters and their gradient; None without adapters.
    """

    x: Tensor
    group: Group | None
    maps: Sequence[_Map]
    dys: Sequence[Tensor]
    learns: Sequence[bool]
    hidden: Tensor | None
    dh: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that get one, in order."""
        found: list[Tensor | None] = []
        for each, learns in zip(self.maps, self.learns, strict=True):
            weight, _, a, b = each.parameters
            found += [weight if learns else None, a, b]
        return [each for each in found if each is not None]

    def add(self, gradients: Sequence[GradAccumulator]) -> None:
        """Add them to `gradients`, in the order of `parameters`."""
        # Gathered again: keeping the whole from the forward, or until a W, would cost what sequence parallelism saves.
        full = self.x if self.group is None else gather_dim1(self.x, self.group)
        left, low_rank = iter(gradients), []
        for each, learns, dy in zip(self.maps, self.learns, self.dys, strict=True):
            if learns:
                next(left).add_product(dy.t(), full.flatten(0, -2))
            if each.adapter is not None:
                low_rank.append((next(left), next(left)))
        adapters = _adapters_of(self.maps)
        if adapters is not None:
            assert self.hidden is not None, "the forward has kept it"
            assert self.dh is not None, "the backward has made it"
            adapters.add_gradients(low_rank, self.dys, self.hidden, self.dh, full)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b; the weight may have a leading dim of parts."""
    if not torch.is_grad_enabled():
        found = packed_product(x, weight, bias)
        if found is not None:
            return found
    if weight.ndim > 2:
        weight, bias = weight.view(-1, x.shape[-1]), None if bias is None else bias.view(-1)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Several linear maps of one input. `group` is None where the input gradient needs no communication.

    The parameters are those of the maps, in order: autograd must see them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group | None, sequence_parallel: bool, maps: Sequence[_Map], *parameters: Any
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.maps, ctx.sequence_parallel = group, maps, sequence_parallel and group is not None
        full = gather_dim1(x, group) if group is not None and sequence_parallel else x
        outputs, hidden = _outputs(maps, full)
        ctx.save_for_backward(x, hidden)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, hidden = ctx.saved_tensors
        group: Group | None = ctx.group
        maps: Sequence[_Map] = ctx.maps
        dys = [dy.flatten(0, -2) for dy in grads]
        adapters = _adapters_of(maps)
        dh = None if adapters is None else adapters.hidden_gradient(dys)
        # Nothing reads it where all that precedes the first adapter of a network is frozen.
        dx = _input_gradient(maps, dys, dh, grads[0].shape[:-1]) if ctx.needs_input_grad[0] else None
        if dx is not None and group is not None and not ctx.sequence_parallel:
            wait = start_all_reduce(dx, group)
        needed = [ctx.needs_input_grad[4 + 4 * index : 8 + 4 * index] for index in range(len(maps))]
        learns = [need[0] for need in needed]
        found = _found(_Gradients(x, group if ctx.sequence_parallel else None, maps, dys, learns, hidden, dh))
        parameter_grads: list[Tensor | None] = []
        for each, dy, need in zip(maps, dys, needed, strict=True):
            parameter_grads.append(next(found) if need[0] else None)
            parameter_grads.append(dy.sum(0).view(each.weight.shape[:-1]) if need[1] else None)
            parameter_grads += [None, None] if each.adapter is None else [next(found), next(found)]
        if dx is not None and ctx.sequence_parallel:
            assert group is not None
            dx = reduce_scatter_dim1(dx, group)
        elif dx is not None and group is not None:
            wait()
        return dx, None, None, None, *parameter_grads


def _input_gradient(maps: Sequence[_Map], dys: Sequence[Tensor], dh: Tensor | None, rows: torch.Size) -> Tensor:
    """Return the gradient of the whole input [*rows, in]; dh: that of the adapters' hidden rows, where there are."""
    dx = dys[0] @ dense(maps[0].weight).flatten(0, -2)
    for each, dy in zip(maps[1:], dys[1:], strict=True):
        dx.addmm_(dy, dense(each.weight).flatten(0, -2))
    adapters = _adapters_of(maps)
    if adapters is not None and dh is not None:
        adapters.add_input_gradient_(dx, dh, rows)
    return dx.view(*rows, -1)


def _found(gradients: _Gradients) -> Iterator[Tensor | None]:
    """Yield what autograd gets for each of the parameters; nothing is computed where there are none."""
    parameters = gradients.parameters
    return iter(weight_gradients(parameters, gradients.add) if parameters else ())


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
        self.adapter: LowRank | None = None
        self.quantized: QuantizedWeight | None = None
        cut: dict[str, Any] = {"dim": dim, "needs_tp_grad_reduce": is_whole, "unit": unit}
        self.weight = new_parameter((*leading, out_features, in_features), context, init_spec=init_spec, **cut)
        self.bias = None
        if bias:
            self.bias = new_parameter((*leading, out_features), context, init="zeros", decay=False, **cut)

    def forward(self, x: Tensor, first_sample: int = 0) -> Tensor:
        """Return [batch, seq, parts * out_features / tp] for x [batch, local seq, in]."""
        return column_linear(x, [self], first_sample)[0]


class ColumnParallelWeights(Protocol):
    """The part of a layer that `column_linear` reads; a tied output projection has it too.

    Attributes:
        weight: not there where `quantized` takes its place.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    context: LayerContext
    adapter: LowRank | None
    quantized: QuantizedWeight | None


def _map_of(layer: "ColumnParallelWeights | RowParallelLinear", bias: Tensor | None, first_sample: int) -> _Map:
    adapter = None if layer.adapter is None else layer.adapter.call(first_sample)
    return _Map(layer.weight if layer.quantized is None else layer.quantized, bias, adapter)


def _apply(x: Tensor, group: Group | None, sequence_parallel: bool, maps: Sequence[_Map]) -> tuple[Tensor, ...]:
    parameters = [parameter for each in maps for parameter in each.parameters]
    return _Linear.apply(x, group, sequence_parallel, maps, *parameters)  # type: ignore[no-untyped-call, no-any-return]


def column_linear(x: Tensor, layers: Sequence[ColumnParallelWeights], first_sample: int = 0) -> tuple[Tensor, ...]:
    """Return each layer's output for one input x [batch, local seq, in]; one collective for all input gradients.

    Args:
        first_sample: number in the run of the first row of the batch, for dropout of adapters.
    """
    context, maps = layers[0].context, [_map_of(layer, layer.bias, first_sample) for layer in layers]
    if not torch.is_grad_enabled():  # in generation autograd's bookkeeping takes as long as a small product
        full = gather_dim1(x, context.tp) if context.sequence_parallel else x
        return _outputs(maps, full)[0]
    return _apply(x, context.tp if context.tp.size > 1 else None, context.sequence_parallel, maps)


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
        self.adapter: LowRank | None = None
        self.quantized: QuantizedWeight | None = None
        self.weight = new_parameter((out_features, in_features), context, dim=1, init_spec=init_spec, unit=unit)
        is_partial = context.sequence_parallel
        self.bias = (
            new_parameter((out_features,), context, init="zeros", decay=False, needs_tp_grad_reduce=is_partial)
            if bias
            else None
        )

    def forward(self, x: Tensor, first_sample: int = 0) -> Tensor:
        """Return [batch, local seq, out] for x [batch, seq, in / tp]."""
        return row_linear([(x, self)], first_sample)


def row_linear(inputs: Sequence[tuple[Tensor, RowParallelLinear]], first_sample: int = 0) -> Tensor:
    """Return the sum of the layers' outputs [batch, local seq, out], each for its own input, in one collective.

    Args:
        inputs: [batch, seq, in / tp] each.
        first_sample: number in the run of the first row of the batch, for dropout of adapters.
    """
    context = inputs[0][1].context
    combine = reduce_scatter_to_sequence_region if context.sequence_parallel else reduce_from_tp_region
    pairs = [(x, _map_of(layer, None, first_sample)) for x, layer in inputs]
    if torch.is_grad_enabled():
        first, *others = [_apply(x, None, False, [each])[0] for x, each in pairs]
    else:
        first, *others = [_outputs([each], x)[0][0] for x, each in pairs]
    for other in others:
        first = first + other
    y: Tensor = combine(first, context.tp)
    for _, layer in inputs:
        if layer.bias is not None:
            y = y + layer.bias
    return y
