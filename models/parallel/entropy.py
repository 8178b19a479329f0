"""Entropy of distributions over a vocabulary that is cut over tp.

    H = log S - T / S,    S = sum_v exp(z_v - M),    T = sum_v exp(z_v - M) (z_v - M),    M = max_v z_v

Ranks exchange three numbers for each row, never the logits, which exist for one chunk of rows at a time.
"""

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import statistics_dtype
from trimaran.models.parallel.group import all_gather
from trimaran.models.parallel.parameter import LayerContext, info_of

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}  # of the logits that exist at once
_FEWEST_ROWS = 64  # of a chunk: each reads the whole weight


@torch.no_grad()
def token_entropies(
    x: Tensor,
    weight: Tensor,
    context: LayerContext,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the entropy, in nats, of each row's softmax(logits / temperature): [rows], the same on every tp rank.

    They are float32 (float64 for float64), without a gradient.

    Args:
        x: [rows, hidden], the weight's dtype, the same rows on every tp rank.
        weight, bias, softcap: as in `vocab.head_loss`.
    Collective over tp.
    """
    shard, dtype = info_of(weight).shard, statistics_dtype(x.dtype)
    num_real = shard.real_length(tuple(weight.shape))
    matrix = weight[:num_real]
    statistics = torch.zeros(3, len(x), dtype=dtype, device=x.device)
    statistics[0] = -torch.inf  # a rank may hold padding alone
    step = max(_FEWEST_ROWS, _CHUNK_BYTES[x.device.type] // (max(1, num_real) * dtype.itemsize))
    for start in range(0, len(x), step) if num_real else ():
        rows = slice(start, min(start + step, len(x)))
        logits = torch.mm(x[rows], matrix.t())
        if bias is not None:
            logits += bias[:num_real]
        z = logits.to(dtype)
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        z.div_(temperature)
        maximum = z.amax(-1)
        z.sub_(maximum[:, None])
        weights = z.exp()
        statistics[0, rows], statistics[1, rows], statistics[2, rows] = maximum, weights.sum(-1), (weights * z).sum(-1)
    return _combine(all_gather(statistics, context.tp))


def _combine(statistics: Tensor) -> Tensor:
    """Return the entropies [rows] from every rank's statistics [ranks, 3, rows]: maximum, S and T relative to it."""
    maxima, sums, products = statistics.unbind(1)
    shift = (maxima - maxima.amax(0)).clamp(min=torch.finfo(statistics.dtype).min)  # -inf: a rank of padding, S = 0
    factor = shift.exp()
    total = (sums * factor).sum(0)
    return total.log() - (factor * (products + shift * sums)).sum(0) / total
