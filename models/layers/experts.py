"""Mixture-of-experts feed-forward layers without dropped tokens.

Shazeer et al. 2017; Mixtral, Jiang et al. 2024, section 2.2.

    p = softmax(W x)                                            over all experts, in float32
    y = sum over the k largest p_e of  p_e / (their sum) * expert_e(x)

A token has one row for each of its experts. The rows are sorted by expert, and each expert runs a few matrix products
over its rows (Gale et al., MegaBlocks, 2023, section 4, with one product per expert). The experts' placement:

    ep 1    every rank holds a part of every expert, cut over tp along the inner width like a plain feed-forward layer
    ep > 1  every rank of the grid of ep and tp ranks holds some experts whole. All tp ranks have their dp rank's
            tokens. Rank (e, t) sends the rows of the experts of (e', t) to that rank and receives the results; the sum
            over tp adds the results of the other tp ranks' experts.

In both cases each tp rank's output, and its gradients of router and input, are parts of a sum over tp.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.kernels.autograd import apply
from trimaran.models.config import TransformerConfig
from trimaran.models.init import init_spec
from trimaran.models.parallel import group
from trimaran.models.parallel.collectives import (
    all_to_all,
    copy_to_tp_region,
    reduce_from_tp_region,
    reduce_scatter_to_sequence_region,
)
from trimaran.models.parallel.gradient import GradAccumulator, add_product_, weight_gradient
from trimaran.models.parallel.parameter import LayerContext, new_parameter


class Router(nn.Module):
    """Chooses each token's experts and their weights."""

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        self.num_chosen, self.renormalize = config.experts_per_token, config.renormalize_experts
        shape = (config.num_experts, config.hidden_size)
        self.weight = new_parameter(shape, context, init_spec=init_spec(config, "router"), needs_tp_grad_reduce=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the experts' probabilities [..., experts], float32 (float64 for float64), for x [..., hidden]."""
        scores = F.linear(x, self.weight)
        return scores.softmax(-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights, expert numbers int64), each [..., experts_per_token], the most probable expert first."""
        weights, chosen = probabilities.topk(self.num_chosen, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.renormalize else weights, chosen


class Experts(nn.Module):
    """This rank's experts, each hidden -> ffn_hidden_size -> hidden, stacked in `up` and `down`."""

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        self._activation, self._droppable = context.kernels.activations[config.activation], context.droppable
        over_ep = context.ep.size > 1
        parts = (2,) if config.is_gated else ()
        count, inner, hidden = config.num_experts, config.ffn_hidden_size, config.hidden_size
        into, out = init_spec(config, "mlp_input"), init_spec(config, "mlp_output")
        inner_dim = 1 + len(parts)
        self.up = new_parameter(
            (count, *parts, inner, hidden), context, dim=0 if over_ep else inner_dim, init_spec=into, over_ep=over_ep
        )
        self.down = new_parameter(
            (count, hidden, inner), context, dim=0 if over_ep else 2, init_spec=out, over_ep=over_ep
        )

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the experts' outputs [rows, hidden]; of experts cut over tp this rank's part of the sum.

        Args:
            rows: [rows, hidden], sorted by expert.
            counts: rows of each expert.
        """
        up = grouped_linear(rows, self.up, counts)
        return grouped_linear(self._droppable.offer(self._activation(up), self._activation, up), self.down, counts)


class ExpertMLP(nn.Module):
    """A router and its experts, in place of a block's feed-forward layer.

    Attributes:
        assumes_even_split: whether every expert gets the same number of rows, whatever the router chooses: for tensors
            without numbers.
    """

    assumes_even_split = False

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        grid = context.ep.size * context.tp.size
        assert context.ep.size == 1 or config.num_experts % grid == 0, (
            f"{config.num_experts} experts do not divide among {grid} ranks"
        )
        self.context, self.num_experts, self.aux_weight = context, config.num_experts, config.router_aux_loss
        self.router = Router(config, context)
        self.experts = Experts(config, context)
        self._load_balancing_loss: Tensor | None = None

    def forward(self, x: Tensor, sequence_weight: float = 0.0) -> Tensor:
        """Return [batch, local seq, hidden] for x of that shape.

        Args:
            sequence_weight: total weight of one sequence's token losses in the gradient, which is also the weight of
                its load-balancing loss.
        Collective over tp and ep, in the forward and in the backward pass.
        """
        context = self.context
        full = copy_to_tp_region(x, context.tp, sequence_parallel=context.sequence_parallel)
        probabilities = self.router(full)
        weights, chosen = self.router.choose(probabilities)
        tokens_per_expert = _tokens_per_expert(chosen, self.num_experts)
        if torch.is_grad_enabled():
            weights = self._attach_load_balancing_gradient(weights, probabilities, tokens_per_expert, sequence_weight)
        plan = self._plan(chosen, tokens_per_expert.sum(0))
        rows = apply(_Dispatch, full.flatten(0, 1), plan)
        y: Tensor = apply(_Combine, self._through_experts(rows, plan), weights, plan)
        combine = reduce_scatter_to_sequence_region if context.sequence_parallel else reduce_from_tp_region
        return combine(y, context.tp)

    def take_load_balancing_loss(self) -> Tensor | None:
        """Return the sum of the load-balancing losses [scalar] of the sequences trained on since the last call.

        They are not weighted: a sequence that uses all experts evenly has 1. None on all but the first tp rank, and
        without sequences.
        """
        total, self._load_balancing_loss = self._load_balancing_loss, None
        return total

    @contextmanager
    def without_counting(self) -> Iterator[None]:
        """Leave the sum of the load-balancing losses as it is: a forward pass inside the block is no new one."""
        total = self._load_balancing_loss
        yield
        self._load_balancing_loss = total

    def _attach_load_balancing_gradient(
        self, weights: Tensor, probabilities: Tensor, tokens_per_expert: Tensor, sequence_weight: float
    ) -> Tensor:
        """Return `weights` with the gradient of the load-balancing loss attached; add the loss to the running sum.

        For each sequence by itself, so that neither microbatches nor ranks change it, L = sum_e f_e P_e, with f_e =
        E / k times the share of the tokens that go to e, and P_e the mean of p_e (DeepSeek-AI, DeepSeek-V3, 2024,
        equations 17 to 20; after Fedus et al., Switch Transformers, 2022, equation 4). f_e has no gradient, so the
        gradient of p_e is f_e over the number of tokens.
        """
        num_tokens, num_chosen = weights.shape[-2:]
        if self.context.tp.rank > 0:  # tp ranks have the same tokens, and their router gradients are summed
            return weights
        shares = tokens_per_expert.unsqueeze(1).to(probabilities.dtype) / (
            num_chosen * num_tokens
        )  # [batch, 1, experts]
        slope = shares * (self.num_experts / num_tokens)
        if self.training:
            loss = (slope * probabilities.detach()).sum()
            self._load_balancing_loss = loss if self._load_balancing_loss is None else self._load_balancing_loss + loss
        weight = self.aux_weight * sequence_weight
        if weight == 0.0:
            return weights
        return _AttachGradient.apply(  # type: ignore[no-untyped-call, no-any-return]
            weights, probabilities, slope * weight
        )

    def _plan(self, chosen: Tensor, tokens_per_expert: Tensor) -> "_DispatchPlan":
        """Return the rows' order by expert and their numbers by rank. Collective over ep; waits for the device once."""
        ep, tp = self.context.ep, self.context.tp
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        if self.assumes_even_split:
            return self._even_plan(chosen, order)
        if ep.size == 1:
            counts = tokens_per_expert.tolist()
            return _DispatchPlan.of(chosen, order, [counts], [counts])
        each = self.num_experts // (ep.size * tp.size)
        if tp.size > 1:
            order = order[(flat // each % tp.size == tp.rank)[order]]
        mine = tokens_per_expert.view(ep.size, tp.size, each)[:, tp.rank].contiguous()
        theirs = group.all_to_all(mine, [1] * ep.size, [1] * ep.size, ep)
        sent, received = torch.stack((mine, theirs)).tolist()
        return _DispatchPlan.of(chosen, order, sent, received)

    def _even_plan(self, chosen: Tensor, order: Tensor) -> "_DispatchPlan":
        """Return a plan in which all experts have as many rows, those left over going to the first ones."""
        ep, each = self.context.ep, self.num_experts
        if ep.size > 1:
            order, each = order[: len(order) // self.context.tp.size], each // (ep.size * self.context.tp.size)
        share, rest = divmod(len(order), ep.size * each)
        counts = [share + (index < rest) for index in range(ep.size * each)]
        table = [counts[start : start + each] for start in range(0, len(counts), each)]
        return _DispatchPlan.of(chosen, order, table, [table[ep.rank]] * ep.size)

    def _through_experts(self, rows: Tensor, plan: "_DispatchPlan") -> Tensor:
        """Return the experts' outputs for this rank's rows, in order; other ranks compute those of their experts."""
        sent, received = ([sum(counts) for counts in table] for table in (plan.sent, plan.received))
        counts = [sum(column) for column in zip(*plan.received, strict=True)]
        rows = all_to_all(rows, sent, received, self.context.ep)
        rows = self.experts(_transposed_runs(rows, plan.received), counts)
        rows = _transposed_runs(rows, list(zip(*plan.received, strict=True)))
        return all_to_all(rows, received, sent, self.context.ep)


@dataclass(frozen=True, eq=False)
class _DispatchPlan:
    """The rows that this rank sends to its ep peers and receives from them. A row is one token for one of its experts.

    Args:
        order: [rows] int64, sorted by expert: the row's token times experts_per_token, plus the index of the expert
            among the token's experts.
        token: [rows] int64: the row's token.
        row: [tokens, experts_per_token] int64: the inverse of `order`; len(order) where another tp rank sends the row.
        sent: [ep peer][expert of that peer] -> rows. received: [ep peer][expert of this rank] -> rows.
        shape: [batch, seq] of the tokens.
    """

    order: Tensor
    token: Tensor
    row: Tensor
    sent: Sequence[Sequence[int]]
    received: Sequence[Sequence[int]]
    shape: torch.Size

    @staticmethod
    def of(
        chosen: Tensor, order: Tensor, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]
    ) -> "_DispatchPlan":
        """Return the plan for the experts `chosen` [batch, seq, experts_per_token]."""
        row = order.new_full((chosen.numel(),), len(order))
        row[order] = torch.arange(len(order), device=order.device)
        return _DispatchPlan(
            order, order // chosen.shape[-1], row.view(-1, chosen.shape[-1]), sent, received, chosen.shape[:-1]
        )

    def by_choice(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield for each of the tokens' choices its rows [tokens, hidden] out of `rows`; zeros where another rank's."""
        table = rows if self.row.numel() == len(rows) else F.pad(rows, (0, 0, 0, 1))
        for choice in self.row.unbind(1):
            yield table.index_select(0, choice)


def _tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """Return how many tokens of each sequence chose each expert [batch, experts] int64.

    chosen: [batch, seq, experts_per_token].
    """
    batch = len(chosen)
    return chosen.new_zeros(batch, num_experts).scatter_add_(
        1, chosen.reshape(batch, -1), torch.ones_like(chosen).view(batch, -1)
    )


def _transposed_runs(rows: Tensor, table: Sequence[Sequence[int]]) -> Tensor:
    """Return `rows`, given in runs of table[i][j] rows with i outermost, reordered with j outermost."""
    if len(table) == 1 or len(table[0]) == 1:
        return rows
    width = len(table[0])
    runs = rows.split([count for counts in table for count in counts])
    return torch.cat([runs[i * width + j] for j in range(width) for i in range(len(table))])


class _Dispatch(torch.autograd.Function):
    """Copies the rows of a plan from their tokens [tokens, hidden]; sums a token's gradients in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        plan: _DispatchPlan = ctx.plan
        first, *others = plan.by_choice(grads[0])
        for other in others:
            first += other
        return first, None


class _Combine(torch.autograd.Function):
    """Sums each token's rows times their weights [batch, seq, experts_per_token] into y [batch, seq, hidden].

    The sum is in the weights' dtype.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: _DispatchPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        y = weights.new_zeros(*plan.shape, rows.shape[1])  # y owns its memory, because the sum over tp is in place
        total = y.view(-1, rows.shape[1])
        for part, factor in zip(plan.by_choice(rows), weights.flatten(0, 1).split(1, dim=1), strict=True):
            total.addcmul_(part.to(y.dtype), factor)
        return y.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        plan: _DispatchPlan = ctx.plan
        dy = grads[0].flatten(0, 1).index_select(0, plan.token)  # [rows, hidden]
        dweights = torch.zeros_like(weights).view(-1)
        dweights[plan.order] = (rows * dy).sum(-1, dtype=weights.dtype)
        drows = (dy * weights.view(-1)[plan.order].unsqueeze(-1)).to(rows.dtype)
        return drows, dweights.view_as(weights), None


class _AttachGradient(torch.autograd.Function):
    """Returns x; the backward pass also gives `like` the gradient `grad`, independent of x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor, grad: Tensor) -> Tensor:
        ctx.shape = like.shape
        ctx.save_for_backward(grad)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.saved_tensors[0].expand(ctx.shape), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.counts = weight, counts
        matrices = weight.view(len(weight), -1, x.shape[1])
        y = x.new_empty(len(x), matrices.shape[1])
        for expert, rows in _runs(counts):
            torch.mm(x[rows], matrices[expert].t(), out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        dy, weight = grads[0].contiguous(), ctx.weight
        matrices = weight.view(len(weight), -1, x.shape[1])
        dx = torch.empty_like(x)
        for expert, rows in _runs(ctx.counts):
            torch.mm(dy[rows], matrices[expert], out=dx[rows])
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, weight_gradient(weight, partial(_add_products, counts=ctx.counts, dy=dy, x=x)), None


def _add_products(gradient: GradAccumulator, counts: Sequence[int], dy: Tensor, x: Tensor) -> None:
    """Add dy^T x of each expert's rows. dy: [rows, out], x: [rows, in]."""
    total = gradient.total().view(len(counts), dy.shape[1], x.shape[1])
    for expert, rows in _runs(counts):
        add_product_(total[expert], dy[rows].t(), x[rows])


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) of the experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each row of x times the transposed matrix of its expert, [rows, out].

    The weight's gradient goes where `GradAccumulator` puts it, also where no expert has a row.

    Args:
        x: [rows, in], the first counts[0] rows for expert 0, and so on; the counts add up to the rows.
        weight: parameter [experts, ..., in]; the dims between are the outputs.
    """
    out: Tensor = apply(_GroupedLinear, x, weight, counts)
    return out
