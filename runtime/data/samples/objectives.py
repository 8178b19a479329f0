"""What the model reads and what it must predict of a sample, for each objective.

The hidden tokens are a pure function of (seed, number of the sample in the run, position) and of the document
boundaries. So they are the same at any layout and after a resume, differ between epochs (Liu et al., RoBERTa, 2019,
section 4.1), and are fixed for evaluation. Every sample predicts the same number of tokens, so the mean over a batch
needs no count.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trimaran.models.batch import Microbatch
from trimaran.runtime.data.permutation import Int64Array, UInt64Array, position_draws
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

# Devlin et al. (BERT) 2019, section 3.1, task 1: of the chosen tokens 80% are hidden, 10% replaced by a random token,
# 10% kept.
_MASKED_SHARE, _RANDOM_SHARE = 0.8, 0.1
# Hashes of the same sample and position for different purposes must differ.
_CHOICE, _KIND, _REPLACEMENT = range(3)


class Objective(Protocol):
    """Makes a microbatch from samples."""

    def microbatch(self, spans: Int64Array, samples: Int64Array) -> Microbatch:
        """Return the microbatch of consecutive samples.

        Args:
            spans: [n, seq_len + 1], the samples' tokens, each followed by its next token.
            samples: [n], their numbers in the run, counted over all ranks from step 0.
        """
        ...


class NextToken:
    """Every token predicts the one after it."""

    def microbatch(self, spans: Int64Array, samples: Int64Array) -> Microbatch:
        """See `Objective`."""
        tokens, labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in (spans[:, :-1], spans[:, 1:]))
        return Microbatch(tokens, labels, int(samples[0]))


@dataclass(frozen=True)
class MaskedTokens:
    """Some tokens are hidden and predicted from all others (Devlin et al. 2019, section 3.1).

    Attention crosses document boundaries within a sample.

    Args:
        num_predicted: tokens of a sample that are predicted.
        mask_id: the token that replaces a hidden one.
        eot_id: the token between documents, chosen only where there are too few others.
        vocab_size: a random replacement is drawn from [0, vocab_size).
    """

    seed: int
    num_predicted: int
    mask_id: int
    eot_id: int
    vocab_size: int

    def microbatch(self, spans: Int64Array, samples: Int64Array) -> Microbatch:
        """See `Objective`."""
        tokens = np.ascontiguousarray(spans[:, :-1])
        targets = np.sort(choose_positions(tokens, samples, self.seed, self.num_predicted, self.eot_id), axis=1)
        labels = np.take_along_axis(tokens, targets, axis=1)
        kind = (
            np.take_along_axis(self._draws(samples, tokens.shape[1], _KIND), targets, axis=1).astype(np.float64)
            / 2.0**64
        )
        replacement = np.take_along_axis(
            self._draws(samples, tokens.shape[1], _REPLACEMENT), targets, axis=1
        ) % np.uint64(self.vocab_size)
        shown = np.where(kind < _MASKED_SHARE + _RANDOM_SHARE, replacement.astype(np.int64), labels)
        np.put_along_axis(tokens, targets, np.where(kind < _MASKED_SHARE, self.mask_id, shown), axis=1)
        return Microbatch(
            torch.from_numpy(tokens), torch.from_numpy(labels), int(samples[0]), torch.from_numpy(targets)
        )

    def _draws(self, samples: Int64Array, num_positions: int, purpose: int) -> UInt64Array:
        return position_draws(samples, num_positions, self.seed, purpose)


@dataclass(frozen=True)
class PermutedTokens:
    """Some tokens are predicted in a random order, each from those before it in that order.

    Yang et al. 2019, section 2.3. The tokens that are not predicted come first in the order and all see each other, as
    in the authors' code. That code chooses spans, this one single tokens.

    Args:
        num_predicted, eot_id: see MaskedTokens.
    """

    seed: int
    num_predicted: int
    eot_id: int

    def microbatch(self, spans: Int64Array, samples: Int64Array) -> Microbatch:
        """See `Objective`."""
        tokens = np.ascontiguousarray(spans[:, :-1])
        targets = np.ascontiguousarray(choose_positions(tokens, samples, self.seed, self.num_predicted, self.eot_id))
        labels = np.take_along_axis(tokens, targets, axis=1)
        return Microbatch(
            torch.from_numpy(tokens), torch.from_numpy(labels), int(samples[0]), torch.from_numpy(targets)
        )


def choose_positions(tokens: Int64Array, samples: Int64Array, seed: int, count: int, eot_id: int) -> Int64Array:
    """Return `count` positions of each sample, [n, count] int64, drawn without replacement and in random order.

    Positions of `eot_id` come last.
    """
    draws = position_draws(samples, tokens.shape[1], seed, _CHOICE)
    # An end of a document cannot be learned from its neighbours. The last key of lexsort is the primary one.
    return np.lexsort((draws, tokens == eot_id), axis=1)[:, :count]


def objective_of(spec: "RunSpec", tokenizer: Tokenizer) -> Objective:
    """Return the objective of the run's spec.

    Raises:
        DataError: the objective needs a mask token, and the tokenizer has none.
    """
    objective = spec.transformer.objective
    if objective == "causal_lm":
        return NextToken()
    if objective == "permutation_lm":
        return PermutedTokens(spec.seed, spec.labels_per_sample, tokenizer.eot_id)
    return MaskedTokens(
        spec.seed, spec.labels_per_sample, tokenizer.required_mask_id(), tokenizer.eot_id, tokenizer.vocab_size
    )
