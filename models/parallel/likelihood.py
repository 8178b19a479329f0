"""Log-likelihoods of given tokens under logits whose vocabulary is cut over tp.

Ranks exchange a few numbers for each scored position, never the logits, which exist for one chunk of positions at a
time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import statistics_dtype
from trimaran.models.parallel.group import all_gather
from trimaran.models.parallel.packed import packed_product
from trimaran.models.parallel.parameter import LayerContext, info_of

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of the logits that exist at once
_FEWEST_ROWS = 64  # of a chunk: each reads the whole weight


@dataclass(frozen=True, eq=False)
class Scored:
    """The tokens whose log-likelihoods are asked for.

    Args:
        rows: [positions] int64: rows of the hidden states that predict them, each once.
        of: [tokens] int64: which of `rows` predicts each token, ascending.
        targets: [tokens] int64, global ids.
    """

    rows: Tensor
    of: Tensor
    targets: Tensor


def log_likelihoods(
    x: Tensor, weight: Tensor, scored: Scored, context: LayerContext, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return (the log-likelihood of each scored token, whether it is the likeliest), the same on every tp rank.

    Of equally likely tokens that with the lowest id counts as the likeliest. The log-softmax is computed in float32
    (float64 for float64). Where a position's logits are not finite, its tokens get NaN.

    Args:
        x: [positions, hidden], the hidden states of `scored.rows`.
        weight, bias: as in `vocab.head_loss`.
        softcap: the logits become softcap * tanh(logit / softcap).
    Collective over tp.
    """
    shard, dtype = info_of(weight).shard, statistics_dtype(x.dtype)
    num_real = shard.real_length(tuple(weight.shape))
    matrix = weight[:num_real]
    step = max(_FEWEST_ROWS, _CHUNK_BYTES[x.device.type] // (max(1, num_real) * dtype.itemsize))
    local = scored.targets - shard.offset
    mine = (local >= 0) & (local < num_real)
    column = torch.where(mine, local, 0)
    statistics = torch.full((3, len(x)), -torch.inf, dtype=dtype, device=x.device)  # maximum, its id, sum of exp
    chosen = torch.full((len(local),), -torch.inf, dtype=dtype, device=x.device)
    bounds = list(range(0, len(x), step)) if num_real else []  # a rank may hold padding alone
    edges = torch.searchsorted(scored.of, torch.tensor([*bounds, len(x)], device=x.device)).tolist()
    for start, first, last in zip(bounds, edges, edges[1:], strict=False):
        rows, tokens = slice(start, min(start + step, len(x))), slice(first, last)
        packed = packed_product(x[rows], weight, None)
        logits = torch.mm(x[rows], matrix.t()) if packed is None else packed[:, :num_real]
        if bias is not None:
            logits += bias[:num_real]
        logits = logits.to(dtype)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        chosen[tokens] = logits[scored.of[tokens] - start, column[tokens]]
        maximum, likeliest = logits.max(-1)
        statistics[0, rows], statistics[1, rows] = maximum, (likeliest + shard.offset).to(dtype)
        statistics[2, rows] = logits.sub_(maximum[:, None]).exp_().sum(-1)
    return _combine(statistics, chosen.masked_fill_(~mine, -torch.inf), scored, context)


def _combine(statistics: Tensor, chosen: Tensor, scored: Scored, context: LayerContext) -> tuple[Tensor, Tensor]:
    """Return the result of `log_likelihoods` from every rank's statistics [3, positions] and logits [tokens]."""
    every = all_gather(torch.cat((statistics.flatten(), chosen)), context.tp)
    maxima, ids, sums = every[:, : statistics.numel()].unflatten(1, (3, -1)).unbind(1)
    maximum = maxima.amax(0)
    likeliest = ids.masked_fill(maxima != maximum, torch.inf).amin(0).long()  # ids below 2^24 are exact in float32
    log_sum = (sums.clamp(min=0) * (maxima - maximum).exp()).sum(0).log()
    logit = every[:, statistics.numel() :].amax(0)
    # Relative to the maximum, so that no digits are lost however large the logits are.
    found = logit - maximum[scored.of] - log_sum[scored.of]
    return found.masked_fill(~maximum.isfinite()[scored.of], torch.nan), likeliest[scored.of] == scored.targets
