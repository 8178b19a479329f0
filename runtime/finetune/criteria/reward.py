"""The loss of a reward model: the better answer's score should be higher (Bradley and Terry 1952)."""

import torch.nn.functional as F
from torch import Tensor

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.criteria.dpo import PAIR_STATISTICS
from trimaran.runtime.finetune.criteria.statistics import Statistics
from trimaran.runtime.finetune.data.loader import ExampleBatch


class Reward:
    """-log sigmoid(s_chosen - s_rejected - margin) of each pair, s the score at an answer's last token.

    Ouyang et al. 2022, equation 1; margins: Touvron et al. 2023 (LLaMA 2), equation 2.

    Args:
        centering: weight of (s_chosen + s_rejected)^2, which keeps scores around 0 (Eisenstein et al. 2023).
    """

    def __init__(self, centering: float = 0.0) -> None:
        self.centering = centering
        self._statistics = Statistics(PAIR_STATISTICS)
        self.names = self._statistics.names

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the sum of the pairs' losses [scalar]; see `Criterion`."""
        scores = document_scores(head, hidden, batch)
        chosen, rejected = scores[0::2], scores[1::2]
        assert isinstance(batch, ExampleBatch)
        self._statistics.add(chosen > rejected, chosen - rejected, chosen, rejected)
        losses = -F.logsigmoid(chosen - rejected - batch.values) + self.centering * (chosen + rejected).square()
        return losses.sum()

    def take_sums(self) -> Tensor:
        """See `Criterion`."""
        return self._statistics.take()


def document_scores(head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
    """Return the score at each document's last token [documents], float64. Collective over tp."""
    assert isinstance(batch, ExampleBatch), type(batch)
    return head.scores(hidden, batch.spans[:, 1] - 1).double()
