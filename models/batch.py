"""The record that the data loader hands to the first and the last pipeline stage."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of one data-parallel rank.

    Args:
        tokens: [micro_batch, seq], int64, the model's input.
        labels: [micro_batch, seq], int64, the token to predict at every position (for a causal model the next token);
            -100 marks a position without a loss. With `targets`: [micro_batch, predicted].
        first_sample: global index of the first sample among all samples since step 0. It keys the dropout masks, so
            that every layout draws the same mask for the same sample.
        targets: [micro_batch, predicted], int64, the positions of the labels, for permutation_lm in the order of
            prediction; None where every position has a label.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    first_sample: int
    targets: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Microbatch":
        """Return the microbatch with its tensors on `device`."""
        targets = None if self.targets is None else self.targets.to(device)
        return Microbatch(self.tokens.to(device), self.labels.to(device), self.first_sample, targets)
