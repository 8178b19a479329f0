"""Direct preference optimization (Rafailov et al. 2023, equation 7), with label smoothing and a share of imitation."""

import torch.nn.functional as F
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.criteria.batch import comparison, document_log_probs
from trimaran.runtime.finetune.criteria.statistics import Statistics

PAIR_STATISTICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
"""Share of the pairs whose chosen answer has the higher reward, and means over the pairs."""


class DPO:
    """-log sigmoid(beta * (r_chosen - r_rejected)) of each pair, r the log-ratio of an answer to the reference.

    With label smoothing e it is the expected loss where a share e of the preferences is wrong (Mitchell 2023). The
    reward of an answer is beta * r.

    Args:
        sft_weight: weight of the mean cross entropy of the chosen answers' tokens of the global batch (Pang et al.
            2024).
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> None:
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight
        self._statistics = Statistics(PAIR_STATISTICS)
        self.names = self._statistics.names

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the pairs' losses [scalar]; see `Criterion`."""
        pairs = comparison(batch)
        found = document_log_probs(head, hidden, pairs)
        rewards = self.beta * (found - pairs.reference)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        self._statistics.add(margins > 0, margins, chosen, rejected)
        right, wrong = -F.logsigmoid(margins), -F.logsigmoid(-margins)
        loss = ((1.0 - self.label_smoothing) * right + self.label_smoothing * wrong).sum()
        if self.sft_weight:
            loss = loss - self.sft_weight / pairs.first_tokens_per_loss * found[0::2].sum()
        return loss

    def take_sums(self) -> Tensor:
        """See `Criterion`."""
        return self._statistics.take()
