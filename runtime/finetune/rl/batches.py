"""Rows of the training engine with a prompt and a sampled answer each, and what a policy's loss reads of their tokens.

What belongs to a token stands at the position that predicts it, where its label is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL
from trimaran.models.batch import Microbatch

_PADDING = 0


@dataclass(frozen=True)
class PolicyBatch(Microbatch):
    """A microbatch of sampled answers.

    Args:
        weights: [micro_batch, width] float64, of each token's loss in the sum.
        advantages: [micro_batch, width] float64.
        old_log_probs: of the policy that has sampled; None where that is the one that is trained.
        checked_log_probs: those that the policy must still have; None where nothing is compared.
        reference_log_probs: None without a divergence in the loss.
        old_values, returns: of the value function; None without one.
    All of the shape of the labels.
    """

    weights: Tensor | None = None
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None
    checked_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Prompts with their answers, a row each, padded on the right.

    Args:
        tokens, labels: [samples, width] int64; labels are those of the answers' tokens.
    """

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], multiple: int) -> "Rows":
        """Return the rows of answers, each with at least one token, to prompts with at least one.

        Args:
            multiple: of which the width is one.
        """
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - 1
        width = -(-longest // multiple) * multiple
        tokens = torch.full((len(prompts), width), _PADDING)
        labels = torch.full((len(prompts), width), IGNORED_LABEL)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            whole = torch.tensor([*prompt, *answer])
            tokens[row, : len(whole) - 1] = whole[:-1]
            labels[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
        return cls(tokens, labels)

    @property
    def mask(self) -> Tensor:
        """[samples, width] bool: where a token of an answer is predicted."""
        return self.labels != IGNORED_LABEL

    def spread(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Return a number of each answer's token at its place, 0 elsewhere: [samples, width] float64."""
        out = torch.zeros(self.labels.shape, dtype=torch.float64)
        out[self.mask] = torch.tensor([value for each in values for value in each], dtype=torch.float64)
        return out

    def batches(
        self, rows: Sequence[int], micro_batch_size: int, first_sample: int, extra: Mapping[str, Tensor]
    ) -> list[PolicyBatch]:
        """Return the microbatches of these rows in their order.

        Args:
            first_sample: number of the first row among all of the run.
            extra: name -> [samples, width], of what `PolicyBatch` has beside tokens and labels.
        """
        found = []
        for start in range(0, len(rows), micro_batch_size):
            part = torch.tensor(rows[start : start + micro_batch_size])
            given: dict[str, Any] = {name: value[part] for name, value in extra.items()}
            found.append(PolicyBatch(self.tokens[part], self.labels[part], first_sample + start, **given))
        return found
