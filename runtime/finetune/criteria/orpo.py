"""Odds ratio preference optimization (Hong et al. 2024, equations 6 and 7), which needs no reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.criteria.batch import comparison, document_log_probs, learned_tokens
from trimaran.runtime.finetune.criteria.dpo import PAIR_STATISTICS
from trimaran.runtime.finetune.criteria.statistics import Statistics

_LEAST = 1e-12  # of -log p: a probability of 1 has no odds


class ORPO:
    """The cross entropy of the chosen answers' tokens, plus -beta log sigmoid(log odds ratio) of each pair.

    The probability of an answer is the geometric mean of its tokens'. The cross entropy is the mean over all chosen
    tokens of the global batch; the prompts' tokens are not in it (in TRL they are). The reward of an answer is beta
    times the logarithm of its probability.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self._statistics = Statistics(PAIR_STATISTICS)
        self.names = self._statistics.names

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the pairs' losses [scalar]; see `Criterion`."""
        pairs = comparison(batch)
        found = document_log_probs(head, hidden, pairs)
        means = (found / learned_tokens(pairs).clamp(min=1.0)).clamp(max=-_LEAST)
        log_odds = means - torch.log(-torch.expm1(means))
        chosen, rejected = self.beta * means[0::2], self.beta * means[1::2]
        self._statistics.add(chosen > rejected, chosen - rejected, chosen, rejected)
        ratio = F.logsigmoid(log_odds[0::2] - log_odds[1::2])
        return -(self.beta * ratio).sum() - found[0::2].sum() / pairs.first_tokens_per_loss

    def take_sums(self) -> Tensor:
        """See `Criterion`."""
        return self._statistics.take()
