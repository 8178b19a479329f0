"""The loss of sampled answers: clipped ratios, the divergence from the reference, and PPO's values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.rl.batches import PolicyBatch
from trimaran.runtime.finetune.rl.losses import is_clipped, k3_divergence, policy_losses, value_losses


@dataclass(frozen=True)
class PolicySettings:
    """The settings of the loss; see `RLSettings`."""

    temperature: float
    clip_low: float
    clip_high: float
    kl: float
    value_coef: float = 0.0


def spread_values(head: Head, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the score head's value at each position of the mask [micro_batch, width], 0 elsewhere."""
    rows = mask.flatten().nonzero().squeeze(1)
    found = head.scores(hidden, rows)
    return found.new_zeros(mask.numel()).index_put((rows,), found).view(mask.shape)


@dataclass(eq=False)
class PolicyLoss:
    """The clipped loss of sampled answers, with the divergence from the reference, and what a step tells of them.

    Args:
        names: "tokens", "clipped", "entropy", "old_kl", and where the batches have what it takes "kl", "value_loss".

    Attributes:
        largest_gap: of |ratio - 1| to the batches' `checked_log_probs`, over this rank's tokens so far [scalar].
    """

    settings: PolicySettings
    names: Sequence[str]
    largest_gap: Tensor = field(default_factory=lambda: torch.zeros(()))
    _sums: Tensor | None = None

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return the weighted sum of the losses of the answers' tokens [scalar]."""
        assert isinstance(batch, PolicyBatch)
        assert batch.weights is not None
        assert batch.advantages is not None
        settings = self.settings
        found = head.token_log_probs(hidden, batch, settings.temperature)
        entropies = head.token_entropies(hidden, batch, settings.temperature)
        mask = batch.labels != IGNORED_LABEL
        weights, advantages = batch.weights.to(found.dtype), batch.advantages.to(found.dtype)
        old = found.detach() if batch.old_log_probs is None else batch.old_log_probs.to(found.dtype)
        ratios = torch.where(mask, found - old, 0.0).exp()
        losses = policy_losses(ratios, advantages, settings.clip_low, settings.clip_high)
        statistics = {
            "tokens": mask,
            "clipped": mask & is_clipped(ratios, advantages, settings.clip_low, settings.clip_high),
            "entropy": entropies,
            "old_kl": torch.where(mask, k3_divergence(found.detach(), old), 0.0),
        }
        if batch.reference_log_probs is not None:
            divergence = torch.where(mask, k3_divergence(found, batch.reference_log_probs.to(found.dtype)), 0.0)
            losses = losses + settings.kl * divergence
            statistics["kl"] = divergence.detach()
        if batch.old_values is not None and batch.returns is not None:
            values = spread_values(head, hidden, mask).to(found.dtype)
            old_values, returns = batch.old_values.to(found.dtype), batch.returns.to(found.dtype)
            errors = torch.where(mask, value_losses(values, old_values, returns, settings.clip_high), 0.0)
            losses = losses + settings.value_coef * errors
            statistics["value_loss"] = errors.detach()
        self._count(statistics)
        if batch.checked_log_probs is not None:
            gaps = torch.where(mask, found.detach() - batch.checked_log_probs, 0.0).expm1().abs()
            self.largest_gap = torch.maximum(self.largest_gap.to(gaps), gaps.max())
        return (losses * weights).sum()  # weights are 0 where no answer's token is predicted

    def take_sums(self) -> Tensor:
        """Return the sums of the statistics since the last call [names] float64."""
        sums, self._sums = self._sums, None
        return torch.zeros(len(self.names), dtype=torch.float64) if sums is None else sums

    def _count(self, statistics: dict[str, Tensor]) -> None:
        sums = torch.stack([statistics[name].sum(dtype=torch.float64) for name in self.names])
        self._sums = sums if self._sums is None else self._sums + sums
