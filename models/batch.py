"""The record that crosses from the data loader to the first and the last pipeline stage."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of one data-parallel rank.

    Args:
        tokens: [micro_batch, seq], int64, the model's input.
        labels: [micro_batch, seq], int64, the token to predict at every position, which is the next one of a causal
            model; -100 marks a position without a loss. With `targets` [micro_batch, predicted].
        first_sample: global index of the first sample among all samples consumed since step 0. Dropout is keyed by it,
            so that any layout draws the same numbers for the same sample.
        targets: [micro_batch, predicted], int64, the positions of which `labels` has the tokens, for permutation_lm in
            the order in which they are predicted; None where it has one for every position.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    first_sample: int
    targets: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Microbatch":
        """Return it with its tensors on `device`."""
        targets = None if self.targets is None else self.targets.to(device)
        return Microbatch(self.tokens.to(device), self.labels.to(device), self.first_sample, targets)
