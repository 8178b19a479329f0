"""Embedding, and head with loss, over a vocabulary cut over tp (Megatron-LM, Shoeybi et al. 2019, section 3).

The logits are by far the largest activation of a model, so they are never gathered and never exist as a whole.
`head_loss` computes them for one chunk of tokens at a time. Only a scalar follows the logits, so it turns each chunk
into its gradient at once (for one rank: Liger Kernel, Hsu et al. 2024, section 3.2).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimaran.kernels.autograd import apply
from trimaran.kernels.cross_entropy import (
    IGNORED_LABEL,
    TORCH_CROSS_ENTROPY,
    CrossEntropyKernels,
    combine,
    statistics_dtype,
)
from trimaran.models.parallel.collectives import (
    gather_dim1,
    reduce_from_tp_region,
    reduce_scatter_dim1,
    reduce_scatter_to_sequence_region,
)
from trimaran.models.parallel.gradient import GradAccumulator, add_product_, weight_gradient
from trimaran.models.parallel.group import all_gather, start_all_reduce
from trimaran.models.parallel.parameter import InitSpec, LayerContext, info_of, new_parameter


class _LocalEmbedding(torch.autograd.Function):
    """Rows of the local shard; zeros for other ranks' tokens. The gradient is added row by row, never dense."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, first: int) -> Tensor:
        local = tokens - first
        mine = (local >= 0) & (local < weight.shape[0])
        ctx.weight, ctx.whole = weight, weight.shape[0] == info_of(weight).shard.global_shape[0]
        ctx.save_for_backward(local, mine)
        if ctx.whole:
            return weight[local]
        return weight[torch.where(mine, local, 0)] * mine.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        local, mine = ctx.saved_tensors
        (dy,) = grads
        compute = partial(_add_rows, whole=ctx.whole, local=local, mine=mine, dy=dy)
        return weight_gradient(ctx.weight, compute), None, None


def _add_rows(gradient: GradAccumulator, whole: bool, local: Tensor, mine: Tensor, dy: Tensor) -> None:
    """Add the gradients dy [..., hidden] to the rows `local` [...]; where not `whole`, only those of `mine`."""
    total = gradient.total()
    if dy.device.type == "cpu":
        if not whole:
            local, dy = local[mine], dy[mine]
        total.index_add_(0, local.flatten(), dy.flatten(0, -2).to(total.dtype))
    else:
        # On a GPU index_add_ adds atomically, in an order that changes between runs, and selecting rows by a mask
        # waits for the device. index_put_ sorts.
        if not whole:
            local, dy = torch.where(mine, local, 0), dy * mine.unsqueeze(-1)
        total.index_put_((local.flatten(),), dy.flatten(0, -2).to(total.dtype), accumulate=True)


class VocabParallelEmbedding(nn.Module):
    """A token embedding [vocab, hidden] with rows cut over tp, the last padded where tp does not divide vocab."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext, *, init_spec: InitSpec) -> None:
        super().__init__()
        self.context = context
        self.weight = new_parameter((vocab_size, hidden_size), context, dim=0, init_spec=init_spec)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [batch, local seq, hidden] for tokens [batch, seq] int64, global ids."""
        rows: Tensor = apply(_LocalEmbedding, self.weight, tokens, info_of(self.weight).shard.offset)
        combine_ = reduce_scatter_to_sequence_region if self.context.sequence_parallel else reduce_from_tp_region
        return combine_(rows, self.context.tp)


_CHUNK_BYTES, _CHUNK_ROWS = {"cpu": 8 << 20, "cuda": 128 << 20}, {"cpu": 256, "cuda": 1024}
"""Bounds of a chunk by device type: most bytes of logits, but at least these rows.

On a CPU the logits of a chunk should fit the cache. But each chunk reads the weight and its gradient once and ends with
a wait for the other ranks, which only pays for many rows.
"""
_ALIGNED_ROWS, _ALIGNED_COLUMNS = 128, 64  # multiples that are fast in matrix products and vector loads


@dataclass(frozen=True, eq=False)
class _Gradients:
    """The needed gradients, to be filled in.

    dx: [rows, hidden]; dweight: [real vocabulary, hidden]; dbias: [real vocabulary].
    factor: of what is added to dweight and dbias; None where it is written there, unscaled.
    """

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    factor: float | None

    @property
    def any(self) -> bool:
        """Whether any gradient is needed."""
        return self.dx is not None or self.dweight is not None or self.dbias is not None


@dataclass(frozen=True)
class _Head:
    """The settings of one call of `head_loss`."""

    context: LayerContext
    kernels: CrossEntropyKernels
    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk_rows: int | None
    temperature: float = 1.0
    skips_rows: bool = False

    def losses(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        grads: _Gradients,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the losses [rows] and fill `grads` with the gradients of their sum, weighted by `row_weights`.

        Args:
            x: [rows, hidden]; weight: [local vocabulary, hidden]; bias: [local vocabulary]; labels: [rows].
            row_weights: [rows]; None: 1 each.
        """
        shard = info_of(weight).shard
        num_real, vocab_size = shard.real_length(tuple(weight.shape)), shard.global_shape[0]
        matrix = weight[:num_real]
        width = -(-weight.shape[0] // _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS
        step = self.chunk_rows or _chunk_rows(len(x), width * x.element_size(), x.device)
        buffer = x.new_empty(min(step, len(x)), width)
        losses = x.new_empty(len(x), dtype=statistics_dtype(x.dtype))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            logits = buffer[: rows.stop - start]
            real = logits[:, :num_real]
            torch.mm(x[rows], matrix.t(), out=real)
            if bias is not None:
                real += bias[:num_real]
            slope = None if self.softcap is None else _cap_(real, self.softcap, with_slope=grads.any)
            if self.temperature != 1.0:
                real /= self.temperature
            where = (labels[rows], shard.offset, num_real)
            statistics = self.kernels.statistics_(logits, *where, self.label_smoothing > 0)
            terms = (vocab_size, self.label_smoothing, self.z_loss)
            losses[rows], normalizer = combine(all_gather(statistics, self.context.tp), labels[rows], *terms)
            if not grads.any:
                continue
            self.kernels.gradient_(logits, *where, statistics, normalizer, *terms)
            if slope is not None:
                real *= slope
            if row_weights is not None:
                real *= (row_weights[rows] / self.temperature).to(real.dtype).unsqueeze(1)
            if grads.dx is not None:
                torch.mm(real, matrix, out=grads.dx[rows])
            factor, overwrite = (1.0, start == 0) if grads.factor is None else (grads.factor, False)
            if grads.dweight is not None:
                add_product_(grads.dweight, real.t(), x[rows], factor=factor, overwrite=overwrite)
            if grads.dbias is not None:
                total = real.sum(0, dtype=grads.dbias.dtype)
                if overwrite:
                    grads.dbias.copy_(total)
                else:
                    grads.dbias.add_(total, alpha=factor)
        return losses


def _cap_(logits: Tensor, cap: float, *, with_slope: bool) -> Tensor | None:
    """Replace the logits by cap * tanh(logits / cap), in place; return the derivative 1 - tanh^2."""
    logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1.0) if with_slope else None
    logits.mul_(cap)
    return slope


def _chunk_rows(num_rows: int, row_bytes: int, device: torch.device) -> int:
    """Return the rows of a chunk, such that all chunks have about the same length."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    most = max(_CHUNK_ROWS[kind], _CHUNK_BYTES[kind] // row_bytes)
    even = -(-num_rows // max(1, -(-num_rows // most)))
    return max(1, min(most, -(-even // _ALIGNED_ROWS) * _ALIGNED_ROWS))


class _HeadLoss(torch.autograd.Function):
    """The forward pass computes the gradients for an output gradient of 1; the backward pass scales them.

    Where weight and bias have a `main_grad`, the forward pass adds their gradients there, times `loss_weight`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: _Head,
        with_gradients: bool,
        loss_weight: float,
    ) -> Tensor:
        ctx.context, ctx.weight, ctx.bias = head.context, weight, bias
        full = gather_dim1(x, head.context.tp) if head.context.sequence_parallel else x
        every_row = full.flatten(0, -2)
        rows, labels, learned = every_row, labels.flatten(), None
        if head.skips_rows and x.device.type == "cpu":
            rows, labels, learned = _rows_with_labels(every_row, labels)
        needs_dx, needs_dweight, needs_dbias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        num_real = info_of(weight).shard.real_length(tuple(weight.shape))
        dx = torch.empty_like(rows) if needs_dx else None
        dweight = _gradient_buffer(weight, num_real) if needs_dweight else None
        dbias = _gradient_buffer(bias, num_real) if needs_dbias and bias is not None else None
        in_place = info_of(weight).main_grad is not None
        assert bias is None or (info_of(bias).main_grad is not None) == in_place, "one optimizer has both"
        factor = loss_weight if in_place else None
        losses = head.losses(rows, weight, bias, labels, _Gradients(dx, dweight, dbias, factor))
        if dx is not None:
            dx = dx if learned is None else torch.zeros_like(every_row).index_copy_(0, learned, dx)
            dx = dx.view(full.shape)
        ctx.save_for_backward(dx, None if in_place else dweight, None if in_place else dbias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = ctx.saved_tensors
        (dloss,) = grads
        context: LayerContext = ctx.context
        if dx is not None:
            # Scale in float32: the same factor applies to all elements, so rounding it to bfloat16 would bias them all.
            dx = (dx.to(dloss.dtype) * dloss).to(dx.dtype)
            if not context.sequence_parallel:
                wait = start_all_reduce(dx, context.tp)
        weight_grad = None if dweight is None else _scaled_gradient(ctx.weight, dweight, dloss)
        bias_grad = None if dbias is None else _scaled_gradient(ctx.bias, dbias, dloss)
        if dx is not None:
            if context.sequence_parallel:
                dx = reduce_scatter_dim1(dx, context.tp)
            else:
                wait()
        return dx, weight_grad, bias_grad, None, None, None, None


def _rows_with_labels(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows [n, hidden] that have a label, their labels and their numbers; None: all rows.

    Where a prompt's tokens are not learned, most of the head's work is saved. A GPU would have to wait for the number
    of rows.
    """
    learned = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    if len(learned) == len(labels):
        return rows, labels, None
    return rows.index_select(0, learned), labels[learned], learned


def _gradient_buffer(parameter: Tensor, num_real: int) -> Tensor:
    """Return the real rows of the parameter's `main_grad`, or where it has none new memory for them."""
    main_grad = info_of(parameter).main_grad
    if main_grad is not None:
        return main_grad[:num_real]
    return parameter.new_zeros(num_real, *parameter.shape[1:], dtype=statistics_dtype(parameter.dtype))


def _scaled_gradient(parameter: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient of the parameter's real rows, times `factor`, with its shape and dtype. Padding gets zero."""
    whole = torch.zeros_like(parameter)
    whole[: len(gradient)] = gradient * factor
    return whole


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    context: LayerContext,
    *,
    bias: Tensor | None = None,
    kernels: CrossEntropyKernels = TORCH_CROSS_ENTROPY,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    loss_weight: float = 1.0,
    skips_rows: bool = False,
) -> Tensor:
    """Return the sum of the tokens' losses under the logits x W^T + b: a scalar, the same on all tp ranks.

    It is float32 (float64 for float64). With gradients on, the forward pass computes them, and holds that of `x` until
    the backward pass. The gradients of weight and bias are added to their `main_grad` at once, so nothing of the
    weight's size is held for a microbatch in flight; only where there is no `main_grad`, they are held too.

    Args:
        x: [batch, local seq, hidden], the weight's dtype; with sequence parallelism this rank's part of the sequence.
        weight: [padded vocabulary / tp, hidden], a parameter cut along dim 0: the head's, or a tied embedding's.
        labels: [batch, seq] int64, global ids, the same on every tp rank; kernels.cross_entropy.IGNORED_LABEL gives
            loss and gradient zero, a label outside the vocabulary an infinite loss.
        bias: [padded vocabulary / tp], cut like the weight.
        kernels: the passes over the logits; they must support device and dtype.
        softcap: the logits become softcap * tanh(logit / softcap) (Gemma 2).
        label_smoothing, z_loss: see kernels.cross_entropy.
        loss_weight: the gradient that the backward pass will get, for the gradients of weight and bias.
        chunk_rows: tokens whose logits exist at once, the same on every tp rank; None: chosen by device.
        skips_rows: whether many tokens have no label, so that on a CPU it pays to look for those that have one.
    Collective over tp, in the forward and in the backward pass.
    Raises ValueError for a label_smoothing outside [0, 1), a negative z_loss or chunk_rows below 1.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be in [0, 1)")
    if z_loss < 0:
        raise ValueError(f"z_loss ({z_loss}) must not be negative")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows ({chunk_rows}) must be at least 1")
    head = _Head(context, kernels, label_smoothing, z_loss, softcap, chunk_rows, skips_rows=skips_rows)
    return _HeadLoss.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, weight, bias, labels, head, torch.is_grad_enabled(), loss_weight
    )


class _TokenLosses(torch.autograd.Function):
    """The losses of single tokens, whose gradients have any weights: the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head, with_gradients: bool
    ) -> Tensor:
        ctx.head, ctx.weight, ctx.bias = head, weight, bias
        if with_gradients:
            ctx.save_for_backward(x, labels)
        return head.losses(x, weight, bias, labels, _Gradients(None, None, None, None))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, labels = ctx.saved_tensors
        (row_weights,) = grads
        weight, bias = ctx.weight, ctx.bias
        num_real = info_of(weight).shard.real_length(tuple(weight.shape))
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if needs_dx else None
        dweight = _gradient_buffer(weight, num_real) if needs_dweight else None
        dbias = _gradient_buffer(bias, num_real) if needs_dbias and bias is not None else None
        in_place = info_of(weight).main_grad is not None
        gradients = _Gradients(dx, dweight, dbias, 1.0 if in_place else None)
        ctx.head.losses(x, weight, bias, labels, gradients, row_weights)
        one = row_weights.new_ones(())
        weight_grad = None if dweight is None or in_place else _scaled_gradient(weight, dweight, one)
        bias_grad = None if dbias is None or in_place else _scaled_gradient(bias, dbias, one)
        if dx is not None:
            start_all_reduce(dx, ctx.head.context.tp)()
        return dx, weight_grad, bias_grad, None, None, None


def token_log_probs(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    context: LayerContext,
    *,
    bias: Tensor | None = None,
    kernels: CrossEntropyKernels = TORCH_CROSS_ENTROPY,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the log-probability of each label under the logits x W^T + b, differentiable: [rows], on all tp ranks.

    They are float32 (float64 for float64). Unlike `head_loss` each may have another weight in the gradient, which is
    known only once all are, so the backward pass computes the logits again, chunk by chunk: one more product with the
    weight. It adds the gradients of weight and bias to their `main_grad` where they have one.

    Args:
        x: [rows, hidden], the weight's dtype, the same rows on every tp rank: with sequence parallelism gathered.
        labels: [rows] int64, global ids, the same on every tp rank.
        weight, bias, kernels, softcap, chunk_rows: as in `head_loss`.
        temperature: the logits are divided by it.
    Collective over tp, in the forward and in the backward pass.
    """
    head = _Head(context, kernels, 0.0, 0.0, softcap, chunk_rows, temperature)
    losses = _TokenLosses.apply(x, weight, bias, labels, head, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return -losses  # type: ignore[no-any-return]
