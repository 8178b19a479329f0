"""The prompts of a run in rewards: which of them a rollout takes, as a pure function of its number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import permute
from trimaran.runtime.finetune.data.records import Prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their tokens, ready for the answer.

    Args:
        records: what rewards read.
        tokens: of each, at least one.
    """

    records: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.records)

    def of_rollout(self, rollout: int, count: int, seed: int) -> list[int]:
        """Return the numbers of a rollout's prompts: each once an epoch, in an order of each epoch's own.

        Args:
            rollout: its number, from 0.
            count: prompts of every rollout.
        """
        positions = np.arange(rollout * count, (rollout + 1) * count)
        found: list[int] = []
        for epoch in range(int(positions[0]) // len(self), int(positions[-1]) // len(self) + 1):
            within = positions[positions // len(self) == epoch] % len(self)
            found += permute(within, len(self), seed, epoch).tolist()
        return found


def check_lengths(prompts: PromptSet, seq_len: int, max_new_tokens: int) -> None:
    """Raise DataError where a prompt and its longest answer don't fit into a row."""
    if not len(prompts):
        raise DataError("data.source has no prompt to answer; add records, or choose another data.source")
    room = seq_len - max_new_tokens
    for record, tokens in zip(prompts.records, prompts.tokens, strict=True):
        if len(tokens) > room:
            raise DataError(
                f"the prompt of {record.origin} has {len(tokens)} tokens, and train.seq_len ({seq_len}) less "
                f"finetune.rl.max_new_tokens ({max_new_tokens}) leaves room for {room}; raise train.seq_len, lower "
                "finetune.rl.max_new_tokens, or leave the record out"
            )
