"""The record that crosses from the data loader to the first and the last pipeline stage."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of one data-parallel rank.

    Args:
        tokens: [micro_batch, seq], int64, the model's input.
        labels: [micro_batch, seq], int64, the next token at every position; -100 marks a position without a loss.
        first_sample: global index of the first sample among all samples consumed since step 0. Dropout is keyed by it, so that
            any layout draws the same numbers for the same sample.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    first_sample: int

    def to(self, device: torch.device) -> "Microbatch":
        """Return it with its tensors on `device`."""
        return Microbatch(self.tokens.to(device), self.labels.to(device), self.first_sample)
