"""Low-rank adapters of frozen linear layers (LoRA; Hu et al. 2022, section 4.1), cut like the layer's weight.

    y = x W^T + b + scale dropout(x) A^T B^T       A [rank, in] normal, B [out, rank] zero

    column parallel: A is whole on every rank, whose gradient is a part of a sum over tp; B is cut along its outputs
    row parallel:    A is cut along its inputs; B is whole, whose gradient is a part of a sum over tp: each rank adds
                     its part of the sum over inputs to the output before that is reduced

Neither needs a collective of its own. For stacked matrices [parts, out, in] A is [parts, rank, in] and B [parts, out,
rank]: each matrix has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trimaran.kernels.random import Key, keep_mask, stream_key
from trimaran.models.parallel.gradient import GradAccumulator, add_product_
from trimaran.models.parallel.parameter import InitSpec, LayerContext, ParameterInfo, adopt
from trimaran.models.parallel.shard import Shape, ShardSpec, whole


@dataclass(frozen=True)
class LowRankOptions:
    """What all adapters of a network share.

    Args:
        scale: of the product of the two matrices.
        dropout: rate, of their input.
        seed: of the dropout masks.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    seed: int = 0


class LowRank(nn.Module):
    """The two matrices beside one weight.

    Args:
        shard, shape: of the local weight [out, in] or [parts, out, in].
        is_row_parallel: whether the weight is cut along its inputs.
        is_partial: whether the gradient of a weight that every rank holds whole is a part of a sum over tp.
        name: global name of the layer, on which its masks of dropout depend.
    """

    def __init__(
        self,
        shard: ShardSpec,
        shape: Shape,
        context: LayerContext,
        options: LowRankOptions,
        *,
        is_row_parallel: bool,
        is_partial: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.options, self.context = options, context
        *leading, out, width = shard.global_shape
        self.width, self.first_column = width, shard.offset if is_row_parallel else 0
        self._key: Key = stream_key(options.seed, f"{name}.adapter.dropout")
        a_shape, b_shape = (*leading, options.rank, width), (*leading, out, options.rank)
        cut_a = is_row_parallel and shard.dim is not None
        a_shard = ShardSpec(shard.axis, len(leading) + 1, a_shape, shard.offset) if cut_a else whole(a_shape)
        cut_b = not is_row_parallel and shard.dim is not None
        b_shard = ShardSpec(shard.axis, len(leading), b_shape, shard.offset) if cut_b else whole(b_shape)
        # The variance of PEFT's uniform numbers (Kaiming's with a = sqrt(5)).
        self.a = _parameter(
            a_shard, (*leading, options.rank, shape[-1]), context, std=(3 * width) ** -0.5, is_partial=not cut_a
        )
        self.b = _parameter(
            b_shard, (*leading, shape[-2], options.rank), context, std=None, is_partial=is_row_parallel or is_partial
        )

    def call(self, first_sample: int) -> "LowRankCall":
        """Return the adapter's part of one forward and backward pass.

        Args:
            first_sample: number in the run of the first row of the batch.
        """
        rate = self.options.dropout if self.training else 0.0
        return LowRankCall(self, first_sample, rate)


def _parameter(
    shard: ShardSpec, shape: Shape, context: LayerContext, *, std: float | None, is_partial: bool
) -> nn.Parameter:
    init: Literal["normal", "zeros"] = "zeros" if std is None else "normal"
    info = ParameterInfo(shard, init, InitSpec(std or 0.0), needs_tp_grad_reduce=is_partial, queue=context.queue)
    return adopt(shape, context, info)


@dataclass(frozen=True, eq=False)
class LowRankCall:
    """An adapter at one place of the run's samples."""

    adapter: LowRank
    first_sample: int
    rate: float

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.adapter.a, self.adapter.b

    def dropped(self, x: Tensor) -> Tensor:
        """Return x [batch, seq, local in] after dropout, whose mask depends on sample, position and column alone."""
        return x if self.rate == 0.0 else x * self._factors(x)

    @property
    def a(self) -> Tensor:
        """A [parts * rank, local in], which no gradient flows to."""
        a = self.adapter.a.detach()
        return a.view(-1, a.shape[-1])

    def add_(self, y: Tensor, hidden: Tensor) -> None:
        """Add scale hidden B^T to y [..., parts * local out]; hidden: [rows, parts * rank]."""
        rows, scale = y.view(-1, y.shape[-1]), self.adapter.options.scale
        for out, low, b in self._parts(rows, hidden):
            out.addmm_(low, b.t(), alpha=scale)

    def write_hidden_gradient(self, dy: Tensor, dh: Tensor) -> None:
        """Write the gradient of the hidden rows to dh [rows, parts * rank], for that of y [rows, parts * local out]."""
        for out, low, b in self._parts(dy, dh):
            torch.mm(out, b, out=low)
        dh.mul_(self.adapter.options.scale)

    def add_input_gradient_(self, dx: Tensor, dh: Tensor, leading: Shape) -> None:
        """Add the gradient of the input [*leading, local in] to dx [rows, local in]; leading: (batch, seq)."""
        dx.addcmul_(dh @ self.a, self._factors(dx.view(*leading, -1)).flatten(0, -2))

    def add_b_gradient(self, b: GradAccumulator, dy: Tensor, hidden: Tensor) -> None:
        """Add the gradient of B; dy: [rows, parts * local out]."""
        total = b.total()
        total = total.view(-1, *total.shape[-2:])
        for part, (out, low, _) in zip(total, self._parts(dy, hidden), strict=True):
            add_product_(part, out.t(), low, factor=self.adapter.options.scale)

    def _parts(self, wide: Tensor, narrow: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each part's columns of `wide` and of `narrow`, and its B."""
        b = self.adapter.b.detach()
        matrices = b.view(-1, *b.shape[-2:])
        columns = wide.chunk(len(matrices), dim=1), narrow.chunk(len(matrices), dim=1)
        return list(zip(*columns, matrices, strict=True))

    def _factors(self, x: Tensor) -> Tensor:
        """Return 0 or 1 / (1 - rate) for every element of x [batch, seq, local in]."""
        adapter, (batch, seq_len, length) = self.adapter, x.shape
        first = self.first_sample * seq_len
        rows = torch.arange(first, first + batch * seq_len, device=x.device)
        columns = adapter.first_column, adapter.first_column + length
        keep = keep_mask(adapter._key, rows, adapter.width, self.rate, *columns)
        return keep.view(x.shape).to(x.dtype).div_(1.0 - self.rate)


@dataclass(frozen=True, eq=False)
class LowRankCalls:
    """The adapters of several linear maps of one input, of which some map has none.

    Their A are multiplied in one product, unless dropout gives each an input of its own. `hidden`: what they make of
    the input [rows, sum of parts * rank], the columns of each adapter after those of the one before.

    Args:
        calls: for each map its adapter.
    """

    calls: Sequence[LowRankCall | None]

    def hidden(self, x: Tensor) -> Tensor:
        """Return dropout(x) A^T of every adapter, for x [batch, seq, local in]."""
        if self._is_shared:
            return x.flatten(0, -2) @ self._a().t()
        return torch.cat([call.dropped(x).flatten(0, -2) @ call.a.t() for call in self._present], dim=1)

    def split(self, hidden: Tensor) -> list[Tensor | None]:
        """Return each map's columns, None where it has no adapter."""
        columns = iter(hidden.split([len(call.a) for call in self._present], dim=1))
        return [None if call is None else next(columns) for call in self.calls]

    def hidden_gradient(self, dys: Sequence[Tensor]) -> Tensor:
        """Return the gradient of `hidden` for those of the maps' outputs [rows, parts * local out]."""
        dh = dys[0].new_empty(len(dys[0]), sum(len(call.a) for call in self._present))
        for call, dy, part in zip(self.calls, dys, self.split(dh), strict=True):
            if call is not None and part is not None:
                call.write_hidden_gradient(dy, part)
        return dh

    def add_input_gradient_(self, dx: Tensor, dh: Tensor, leading: Shape) -> None:
        """Add the gradient of the input [*leading, local in] to dx [rows, local in]; leading: (batch, seq)."""
        if self._is_shared:
            dx.addmm_(dh, self._a())
            return
        for call, part in zip(self.calls, self.split(dh), strict=True):
            if call is not None and part is not None:
                call.add_input_gradient_(dx, part, leading)

    def add_gradients(
        self,
        gradients: Sequence[tuple[GradAccumulator, GradAccumulator]],
        dys: Sequence[Tensor],
        hidden: Tensor,
        dh: Tensor,
        x: Tensor,
    ) -> None:
        """Add the gradients of A and B.

        Args:
            gradients: those of A and B, of each adapter.
            dys: gradients of the maps' outputs [rows, parts * local out].
            x: the input [batch, seq, local in].
        """
        if self._is_shared and len(gradients) > 1:
            totals = [a.total() for a, _ in gradients]
            whole = x.new_empty(dh.shape[1], x.shape[-1], dtype=totals[0].dtype)
            add_product_(whole, dh.t(), x.flatten(0, -2), overwrite=True)
            for total, part in zip(totals, whole.split([len(call.a) for call in self._present]), strict=True):
                total.add_(part.view_as(total))
        left = iter(gradients)
        for call, dy, low, d_low in zip(self.calls, dys, self.split(hidden), self.split(dh), strict=True):
            if call is not None and low is not None and d_low is not None:
                a, b = next(left)
                if not self._is_shared or len(gradients) == 1:
                    a.add_product(d_low.t(), call.dropped(x).flatten(0, -2))
                call.add_b_gradient(b, dy, low)

    @property
    def _present(self) -> list[LowRankCall]:
        return [call for call in self.calls if call is not None]

    @property
    def _is_shared(self) -> bool:
        """Whether all have the same input."""
        return all(call.rate == 0.0 for call in self._present)

    def _a(self) -> Tensor:
        """Return every A below the one before [sum of parts * rank, local in]."""
        first, *others = [call.a for call in self._present]
        return torch.cat([first, *others]) if others else first
