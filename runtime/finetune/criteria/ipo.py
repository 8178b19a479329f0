"""Identity preference optimization (Azar et al. 2023, equation 17), over the mean of an answer's tokens."""

from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.criteria.batch import comparison, document_log_probs, learned_tokens
from trimaran.runtime.finetune.criteria.dpo import PAIR_STATISTICS
from trimaran.runtime.finetune.criteria.statistics import Statistics


class IPO:
    """(h - 1 / (2 beta))^2 of each pair, h the difference of the answers' log-ratios to the reference.

    A log-ratio is divided by the answer's tokens, as TRL does after asking the authors: a sum would make the loss grow
    with the square of the length. The reward of an answer is beta times its sum.

    Args:
        sft_weight: see `DPO`.
    """

    def __init__(self, beta: float, sft_weight: float = 0.0) -> None:
        self.beta, self.sft_weight = beta, sft_weight
        self._statistics = Statistics(PAIR_STATISTICS)
        self.names = self._statistics.names

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the pairs' losses [scalar]; see `Criterion`."""
        pairs = comparison(batch)
        found = document_log_probs(head, hidden, pairs)
        ratios = found - pairs.reference
        means = ratios / learned_tokens(pairs).clamp(min=1.0)
        chosen, rejected = self.beta * ratios[0::2], self.beta * ratios[1::2]
        self._statistics.add(chosen > rejected, chosen - rejected, chosen, rejected)
        loss = (means[0::2] - means[1::2] - 1.0 / (2.0 * self.beta)).square().sum()
        if self.sft_weight:
            loss = loss - self.sft_weight / pairs.first_tokens_per_loss * found[0::2].sum()
        return loss

    def take_sums(self) -> Tensor:
        """See `Criterion`."""
        return self._statistics.take()
