"""What the tokens of a rollout are trained towards: their weights, advantages and returns. No model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimaran.kernels.random import stream_key
from trimaran.runtime.data.permutation import permute
from trimaran.runtime.finetune.rl.advantages import generalized_advantages, group_advantages, token_rewards, whitened
from trimaran.runtime.finetune.rl.batches import Rows
from trimaran.runtime.spec.sections.finetune import RLSettings


@dataclass(frozen=True)
class Recorded:
    """Numbers of each answer's token before the rollout's first update, [samples, width] float64.

    Args:
        log_probs: by the training engine; None where nothing needs them.
        values: of the value head; None without one.
        reference: log-probabilities of the reference; None without one.
    """

    log_probs: Tensor | None = None
    values: Tensor | None = None
    reference: Tensor | None = None


def is_on_policy(settings: RLSettings) -> bool:
    """Whether the only update of a rollout is that of the policy which has sampled it, so that every ratio is 1."""
    return settings.epochs * settings.minibatches == 1


def averages_tokens(settings: RLSettings) -> bool:
    """Whether the loss is the mean over tokens, in place of one over answers."""
    return settings.algorithm == "ppo" or settings.loss == "dapo"


def targets_of(settings: RLSettings, rows: Rows, rewards: Sequence[float], recorded: Recorded) -> dict[str, Tensor]:
    """Return what a policy's loss reads of each token: name of a `PolicyBatch` field -> [samples, width] float64.

    Args:
        rewards: of each answer; those of one prompt's answers follow each other.
    """
    scores, mask = torch.tensor(rewards, dtype=torch.float64), rows.mask
    targets: dict[str, Tensor] = {"weights": _weights(settings, mask)}
    if settings.algorithm == "ppo":
        assert recorded.log_probs is not None
        assert recorded.values is not None
        reference = recorded.log_probs if recorded.reference is None else recorded.reference
        by_token = token_rewards(scores, recorded.log_probs - reference, mask, settings.kl)
        advantages, returns = generalized_advantages(
            by_token, recorded.values, mask, gamma=settings.gamma, lam=settings.lam
        )
        targets |= {"advantages": whitened(advantages, mask), "returns": returns, "old_values": recorded.values}
    else:
        groups = group_advantages(scores, settings.group_size, divided=settings.loss != "dr_grpo")
        targets["advantages"] = torch.where(mask, groups[:, None], 0.0)
    if recorded.reference is not None:
        targets["reference_log_probs"] = recorded.reference
    if recorded.log_probs is not None and not (settings.algorithm == "grpo" and is_on_policy(settings)):
        targets["old_log_probs"] = recorded.log_probs
    return targets


def _weights(settings: RLSettings, mask: Tensor) -> Tensor:
    """Return the weight of each token's loss in the sum, of which the step's mean is taken [samples, width]."""
    weights = mask.double()
    if averages_tokens(settings):
        return weights
    if settings.loss == "dr_grpo":
        return weights / settings.max_new_tokens
    return weights / weights.sum(1, keepdim=True)


def num_losses(settings: RLSettings, mask: Tensor) -> int:
    """Return of how many losses a step takes the mean: of the tokens of its rows, or of the answers.

    Args:
        mask: [rows of the step, width] bool.
    """
    return int(mask.sum()) if averages_tokens(settings) else len(mask)


def minibatches_of(settings: RLSettings, samples: int, rollout: int, seed: int) -> list[list[int]]:
    """Return the rows of each optimizer step of a rollout, in an order of each epoch's own, the same on every rank.

    Args:
        samples: rows of the rollout.
    """
    size = samples // settings.minibatches
    found = []
    for epoch in range(settings.epochs):
        order = np.arange(samples)
        if settings.minibatches > 1:
            order = permute(order, samples, stream_key(seed, "minibatches")[0], rollout * settings.epochs + epoch)
        found += [order[start : start + size].tolist() for start in range(0, samples, size)]
    return found


def mean_of(values: Mapping[str, float], name: str) -> float | None:
    """Return the mean over tokens of a statistic of the loss; None where it has none."""
    return values[name] / values["tokens"] if name in values else None
