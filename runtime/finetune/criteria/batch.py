"""Microbatches of answers to compare, and sums over their documents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.models.criterion import Head
from trimaran.runtime.finetune.data.loader import ExampleBatch


@dataclass(frozen=True, kw_only=True)
class ComparisonBatch(ExampleBatch):
    """Examples with what their comparison needs beside the model.

    Args:
        reference: [documents] float64, the reference's log-probability of each document's learned tokens; 0 where the
            loss has no reference.
        first_tokens_per_loss: learned tokens of the first documents (of pairs the chosen ones) of the global batch over
            its examples.
        good_share: share of the global batch's examples whose value is above 0.
    """

    reference: Tensor
    first_tokens_per_loss: float = 1.0
    good_share: float = 0.5


def comparison(batch: object) -> ComparisonBatch:
    """Return the batch, which must be one of examples to compare."""
    assert isinstance(batch, ComparisonBatch), type(batch)
    return batch


def document_sums(values: Tensor, batch: ExampleBatch) -> Tensor:
    """Return the sum of each document's values [documents], float64, differentiable, in the same order every time.

    Args:
        values: [batch, seq].
    """
    starts, stops = batch.spans.unbind(1)
    longest = batch.tokens.shape[1] if batch.documents is None else batch.documents.longest
    places = starts.unsqueeze(1) + torch.arange(longest, device=starts.device)
    inside = places < stops.unsqueeze(1)
    flat = values.double().flatten()
    return (flat[places.clamp(max=flat.numel() - 1)] * inside).sum(1)


def learned_tokens(batch: ExampleBatch) -> Tensor:
    """Return how many tokens of each document are learned [documents], float64."""
    return document_sums((batch.labels != IGNORED_LABEL).double(), batch)


def document_log_probs(head: Head, hidden: Tensor, batch: ExampleBatch) -> Tensor:
    """Return the log-probability of each document's learned tokens [documents], float64. Collective over tp."""
    return document_sums(head.token_log_probs(hidden, batch), batch)
