"""Cross entropy over a vocabulary that is cut over ranks: the parts that need no communication, as torch twins.

    loss_t = log(sum_v exp(z_tv)) - z_t,label(t)          d loss_t / d z_tv = softmax(z_t)_v - [v = label(t)]

Each rank holds the columns [first, first + n) of the logits. It computes the log-sum-exp of its own columns and, for labels in its range, the
label's logit; the ranks exchange these two numbers a token and never the logits (Megatron-LM, Shoeybi et al. 2019, section 3).
"""

import torch
from torch import Tensor

IGNORED_LABEL = -100
_ROWS = 64  # rows handled together in the backward pass: 64 x 8192 float32 stay in a core's cache over three passes


def local_log_softmax(logits: Tensor, labels: Tensor, first: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return (log softmax over the local columns [tokens, n], statistics [2, tokens]).

    Args:
        logits: [tokens, n] float32 or float64, the local columns; those past the vocabulary are overwritten with -inf.
        labels: [tokens] int64, global ids, IGNORED_LABEL for none.
        first: global id of the first local column; vocab_size: number of ids in the whole vocabulary.
    The statistics are the local log-sum-exp and the label's logit where the label is local, else 0; where the whole vocabulary is local, both are
    given relative to the log-sum-exp.
    """
    num_real = min(logits.shape[1], vocab_size - first)
    local = labels - first
    mine = (local >= 0) & (local < num_real)
    column = torch.where(mine, local, 0).unsqueeze(1)
    if num_real <= 0:  # a rank of padding alone: no probability, and no 0/0 in the softmax
        log_probs = torch.full_like(logits, -torch.inf)
        return log_probs, torch.stack((log_probs[:, 0], torch.zeros_like(log_probs[:, 0])))
    logits[:, num_real:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    if num_real == vocab_size:  # the whole vocabulary is here: the log-probability says it all, and no digits cancel
        lse, target = torch.zeros_like(log_probs[:, 0]), log_probs.gather(1, column).squeeze(1)
    else:
        # At the row's maximum the difference of logit and log-probability keeps its digits; at any other column it may not.
        lse, target = logits.amax(-1) - log_probs.amax(-1), logits.gather(1, column).squeeze(1)
    return log_probs, torch.stack((lse, torch.where(mine, target, 0.0)))


def combine(statistics: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss [tokens], log-sum-exp over the whole vocabulary [tokens]) from every rank's statistics [ranks, 2, tokens]."""
    lse = statistics[:, 0].logsumexp(0) if len(statistics) > 1 else statistics[0, 0]
    loss = lse - statistics[:, 1].sum(0)
    return loss.masked_fill(labels == IGNORED_LABEL, 0.0), lse


def logits_gradient_(log_probs: Tensor, correction: Tensor, labels: Tensor, first: int, dloss: Tensor) -> Tensor:
    """Turn `log_probs` [tokens, n] into the gradient of the local logits, in place.

    Args:
        correction: [tokens], local minus global log-sum-exp: what turns a local log-probability into the global one.
        dloss: [tokens], gradient of each token's loss.
    """
    dloss = dloss.masked_fill(labels == IGNORED_LABEL, 0.0)
    for rows in range(0, len(log_probs), _ROWS):
        part = slice(rows, rows + _ROWS)
        log_probs[part].add_(correction[part, None]).exp_().mul_(dloss[part, None])
    local = labels - first
    mine = ((local >= 0) & (local < log_probs.shape[1])).nonzero().squeeze(1)
    log_probs[mine, local[mine]] -= dloss[mine]
    return log_probs
