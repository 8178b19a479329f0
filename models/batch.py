"""The record that the data loader hands to the first and the last pipeline stage."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from trimaran.kernels.attention import Documents


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
        documents: documents packed into the rows, which must not attend to each other; None where a row is one.
        positions: [batch, seq], int64, of each token in its document; None where they count from the row's start.
    A subclass may add tensors.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    first_sample: int
    targets: torch.Tensor | None = None
    documents: Documents | None = None
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """Return the microbatch with its tensors on `device`; a copy from pinned memory is only queued."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """Return the microbatch in pinned memory, which needs a GPU."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        if self.documents is not None:
            changed["documents"] = replace(self.documents, starts=change(self.documents.starts))
        return replace(self, **changed)
