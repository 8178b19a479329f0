"""The clipped losses of single tokens, in plain torch. Tensors are of one shape; the mask is the caller's."""

import torch
from torch import Tensor


def policy_losses(ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO; Schulman et al. 2017, equation 7).

    Two bounds: Yu et al. 2025 (DAPO), section 3.1.

    Args:
        ratios: r, of a token's probability now to that when it was sampled.
    """
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def is_clipped(ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return where clipping changes the loss, so that the token has no gradient: bool."""
    return ((ratios < 1 - clip_low) & (advantages < 0)) | ((ratios > 1 + clip_high) & (advantages > 0))


def k3_divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return the estimate exp(d) - d - 1, d = reference - log_probs, of each token's KL(policy || reference).

    It is unbiased and never negative (k3; Schulman, "Approximating KL divergence", 2020; Shao et al. 2024, equation 4).
    """
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error, the larger of that of the value and that of the value held near its old one.

    Ouyang et al. 2022 have it from Schulman et al.'s code of 2017.

    Args:
        clip: how far a value may go from the old one.
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())
