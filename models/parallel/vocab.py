"""The embedding and the cross entropy over a vocabulary cut over tp; logits are never gathered (Megatron-LM, Shoeybi et al. 2019, section 3)."""

from typing import Any

import torch
from torch import Tensor, nn

from trimaran.kernels.cross_entropy import combine, local_log_softmax, logits_gradient_
from trimaran.models.parallel.collectives import reduce_from_group, scatter_sum_to_sequence
from trimaran.models.parallel.group import Group, all_gather
from trimaran.models.parallel.parameter import Placement, info_of, new_parameter


class _LocalEmbedding(torch.autograd.Function):
    """Rows of the local shard; zeros for tokens of other ranks. The gradient is added row by row, never as a dense [vocab, hidden]."""

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
        if not ctx.whole:
            local, dy = local[mine], dy[mine]
        info = info_of(ctx.weight)
        target = torch.zeros_like(ctx.weight) if info.main_grad is None else info.main_grad
        target.index_add_(0, local.flatten(), dy.flatten(0, -2).to(target.dtype))
        if info.main_grad is None:
            return target, None, None
        info.report()
        return None, None, None


class VocabParallelEmbedding(nn.Module):
    """A token embedding [vocab, hidden] whose rows are cut over tp; the last ranks' shards are padded where tp does not divide vocab."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement, *, std: float) -> None:
        super().__init__()
        self.place = place
        self.weight = new_parameter((vocab_size, hidden_size), place, dim=0, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [batch, seq, hidden] (with sequence parallelism [batch, seq / tp, hidden]) for tokens [batch, seq] int64, global ids."""
        rows: Tensor = _LocalEmbedding.apply(self.weight, tokens, info_of(self.weight).shard.offset)  # type: ignore[no-untyped-call]
        combine_ = scatter_sum_to_sequence if self.place.sequence_parallel else reduce_from_group
        return combine_(rows, self.place.tp)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, vocab_size: int, group: Group) -> Tensor:
        log_probs, statistics = local_log_softmax(logits, labels, first, vocab_size)
        loss, lse = combine(all_gather(statistics, group), labels)
        ctx.first = first
        ctx.save_for_backward(log_probs, statistics[0] - lse, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        log_probs, correction, labels = ctx.saved_tensors
        return logits_gradient_(log_probs, correction, labels, ctx.first, grads[0]), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, first: int, vocab_size: int, group: Group) -> Tensor:
    """Return the loss of every token [tokens], float32 (float64 for float64 logits), the same on all ranks of `group`.

    Args:
        logits: [tokens, local vocabulary], this rank's columns; they are overwritten.
        labels: [tokens] int64, global ids; kernels.cross_entropy.IGNORED_LABEL gives loss and gradient zero.
        first: global id of the first local column.
        vocab_size: columns at or past it are padding and get no probability.
    Collective: all ranks of `group` must enter.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return _CrossEntropy.apply(wide, labels, first, vocab_size, group)  # type: ignore[no-untyped-call, no-any-return]
