"""From rewards to advantages: of a group of answers to one prompt, or of tokens by a value function. No model."""

import torch
from torch import Tensor

_EPSILON = 1e-4  # beside a group's deviation, as in TRL's GRPOTrainer: equal rewards give advantages of 0
_WHITEN_EPSILON = 1e-8


def group_advantages(rewards: Tensor, group_size: int, *, divided: bool = True) -> Tensor:
    """Return each answer's advantage over the other answers to its prompt [answers] (Shao et al. 2024, section 4.1.2).

    Args:
        rewards: [prompts * group_size] float64, the answers to a prompt one after the other.
        group_size: at least 2.
        divided: whether by the group's standard deviation (with Bessel's correction); Liu et al. 2025, section 3.1, do
            not, for it makes prompts that are almost solved, or almost hopeless, count most.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if divided:
        centred = centred / (groups.std(1, keepdim=True) + _EPSILON)
    return centred.flatten()


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of each token (GAE; Schulman et al. 2016, equation 16), 0 outside the mask.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t

    The value after an answer's last token is 0, also where it was cut at its longest: what would follow has no reward.

    Args:
        rewards, values: [answers, positions] float64.
        mask: [answers, positions] bool, the tokens of each answer, which follow each other.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    next_value = torch.zeros_like(following)
    for position in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, position]
        delta = rewards[:, position] + gamma * next_value - values[:, position]
        advantage = delta + gamma * lam * following
        following = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, position], 0.0)
        advantages[:, position] = following
    return advantages, torch.where(mask, advantages + values, 0.0)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the advantages with mean 0 and deviation 1 over the mask, 0 outside it."""
    chosen = advantages[mask]
    variance = chosen.var() if len(chosen) > 1 else chosen.new_zeros(())
    return torch.where(mask, (advantages - chosen.mean()) * (variance + _WHITEN_EPSILON).rsqrt(), 0.0)


def token_rewards(scores: Tensor, divergences: Tensor, mask: Tensor, kl: float) -> Tensor:
    """Return the reward of each token [answers, positions]: the score at the last one, less the weighted divergence.

    Ouyang et al. 2022, equation 2, by tokens.

    Args:
        scores: [answers], of whole answers.
        divergences: [answers, positions], log-probability of each token less the reference's.
        mask: [answers, positions] bool, at least one in each row.
        kl: their weight.
    """
    rewards = torch.where(mask, -kl * divergences, 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None])
