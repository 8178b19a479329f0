"""From logits to tokens: the filters, each a function of logits [batch, vocab], and the draw.

A filter sets the logits of removed tokens to -inf. Formulas and order are those of the logits processors of the
`transformers` package, so the same settings mean the same there; sources in `sampling_params.SamplingParams`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimaran.kernels.random import random_words, stream_key
from trimaran.runtime.infer.sampling_params import SamplingParams

NOT_FINITE = -1
"""Result of `choose` for a sample whose logits have no finite maximum."""

_LIKELY, _MANY = 1024, 4  # tokens that nearly always have all of top_p; so many times as many are dear to sort
_TOKENS = 1 << 31  # columns of the matrix of random numbers: more tokens than any continuation has


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the logits with those of seen tokens divided by the penalty if positive, else multiplied.

    Args:
        seen: bool [batch, vocab].
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Return the logits less `presence` for each token that is there, and `frequency` for each time that it is.

    Args:
        counts: [batch, vocab], how often each token is among the new ones; the dtype of the logits.
    """
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def forbid(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the logits with the tokens of these ids removed."""
    return logits.index_fill(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device), -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return the logits with the k largest of each sample kept, and those equal to the k-th."""
    smallest = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return the logits with the fewest tokens kept whose probabilities sum to p or more; at least one."""
    if logits.shape[1] > _MANY * _LIKELY:
        found = _top_p_of_likeliest(logits, p)
        if found is not None:
            return found
    ascending, order = logits.sort()
    below = ascending.softmax(-1).cumsum(-1) <= 1.0 - p
    below[:, -1] = False
    return logits.masked_fill(torch.zeros_like(below).scatter_(1, order, below), -torch.inf)


def _top_p_of_likeliest(logits: Tensor, p: float) -> Tensor | None:
    """Return `keep_top_p` from the likeliest tokens alone, which takes a tenth of a sort; None where it needs more."""
    likeliest = logits.topk(_LIKELY)
    probabilities = (likeliest.values - logits.logsumexp(-1, keepdim=True)).exp()
    cumulative = probabilities.cumsum(-1)
    if not bool((cumulative[:, -1] > p).all()):
        return None
    kept = cumulative - probabilities < p
    kept[:, 0] = True
    return torch.full_like(logits, -torch.inf).scatter_(
        1, likeliest.indices, likeliest.values.masked_fill(~kept, -torch.inf)
    )


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return the logits with those kept whose probability is at least p times the largest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def filtered(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the logits after temperature, which is not 0, and the enabled filters."""
    # Shift the largest to 0 first: division by a small temperature must not make it infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def uniforms(seed: int, samples: Tensor, first: int, stop: int) -> Tensor:
    """Return the random numbers of new tokens [first, stop): float64 in (0, 1), [len(samples), stop - first].

    Args:
        samples: [n] int64, numbers of the samples among all samples of the command.
    """
    words = random_words(stream_key(seed, "generate"), samples, _TOKENS, first, stop)
    return (words.double() + 0.5) * 2.0**-32


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return token ids [batch] drawn from the softmax of each sample's logits.

    Args:
        uniform: float64 [batch] in (0, 1), one number for each sample.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability reaches the target. The target is above 0, so a removed token is
    # never chosen.
    return torch.searchsorted(cumulative, target).squeeze(1).clamp_(max=logits.shape[1] - 1)


def choose(
    logits: Tensor,
    sampling: SamplingParams,
    num_new: int,
    seen: Tensor | None,
    uniform: Tensor | None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the next token of each sample: int64 [batch], NOT_FINITE where the largest logit is not finite.

    Args:
        logits: [batch, vocab] without padding; computed in float32, or float64 where they are float64.
        num_new: number of new tokens that each sample has already.
        seen: bool [batch, vocab], the tokens of the text so far; None where the penalty is 1.
        uniform: float64 [batch], from `uniforms`; None for greedy decoding.
        counts: [batch, vocab], how often each token is among the new ones; None where no penalty depends on it.
    """
    if seen is not None:
        logits = penalize_repetition(wide(logits), seen, sampling.repetition_penalty)
    if counts is not None:
        logits = penalize_counts(wide(logits), counts, sampling.presence_penalty, sampling.frequency_penalty)
    if num_new < sampling.min_new_tokens and sampling.stop_tokens:
        logits = forbid(logits, sampling.stop_tokens)
    chosen = logits.argmax(-1) if uniform is None else draw(filtered(wide(logits), sampling), uniform)
    return chosen.where(logits.amax(-1).isfinite(), NOT_FINITE)  # on a CPU amax takes a tenth of max's time


def log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probability of each sample's token under softmax(logits / temperature), before any filter.

    NaN for NOT_FINITE. [batch], float32, or float64 where the logits are.

    Args:
        logits: [batch, vocab] without padding.
        tokens: [batch] int64, from `choose`.
        temperature: 0 counts as 1.
    """
    found = (wide(logits) / (temperature or 1.0)).log_softmax(-1)
    return found.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1).where(tokens != NOT_FINITE, torch.nan)


def wide(logits: Tensor) -> Tensor:
    """Return the logits in float32, or float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
