"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 7): from answers that are each good or bad."""

import torch
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.criteria.batch import comparison, document_log_probs
from trimaran.runtime.finetune.criteria.statistics import Statistics


class KTO:
    """1 - sigmoid(+-beta (r - z)) of each answer, + for a good one; r its log-ratio to the reference.

    z is the divergence from the reference, estimated from the prompts of the whole global batch with answers to other
    prompts, so that no layout and no micro batch changes it; no gradient flows through it. Good and bad answers have
    weights of their own in the mean over all answers (section 4.1: lambda_D, lambda_U).

    Statistics: accuracy is the share of the answers that are on their side of z; the rewards, beta * r, are means over
    the good and over the bad ones (NaN without any), margin is their difference.

    Attributes:
        divergence: z of the global batch, at least 0, the same on all ranks; set before the step.
    """

    def __init__(
        self, beta: float, sft_weight: float = 0.0, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        self.beta, self.sft_weight, self.divergence = beta, sft_weight, 0.0
        self.weights = desirable_weight, undesirable_weight
        self._statistics = Statistics(("accuracy", "margin", "chosen_reward", "rejected_reward", "kl"))
        self.names = self._statistics.names

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the answers' losses [scalar]; see `Criterion`."""
        rated = comparison(batch)
        found = document_log_probs(head, hidden, rated)
        good = rated.values > 0
        rewards = self.beta * (found - rated.reference)
        distance = torch.where(good, 1.0, -1.0) * (rewards - self.beta * self.divergence)
        loss = (torch.where(good, *self.weights) * (1.0 - torch.sigmoid(distance))).sum()
        kinds = (_over(rated.good_share) * good, _over(1.0 - rated.good_share) * ~good)
        chosen, rejected = kinds[0] * rewards, kinds[1] * rewards
        same = torch.full_like(rewards, self.divergence)
        self._statistics.add(distance > 0, chosen - rejected, chosen, rejected, same)
        if self.sft_weight:
            loss = loss - self.sft_weight / rated.first_tokens_per_loss * (found * good).sum()
        return loss

    def take_sums(self) -> Tensor:
        """See `Criterion`."""
        return self._statistics.take()


def _over(share: float) -> float:
    """Return 1 / share: what makes a mean over all units one over the units of a kind."""
    return 1.0 / share if share > 0 else float("nan")
