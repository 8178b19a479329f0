"""Microbatches as a pure function of the position in the run: resuming needs no state, any dp sees the same samples."""

from collections.abc import Sequence

import numpy as np

from trimaran.models.batch import Microbatch
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import Int64Array, permute
from trimaran.runtime.data.samples.blend import Blend
from trimaran.runtime.data.samples.objectives import NextToken, Objective
from trimaran.runtime.data.tokens.shards import TokenArray, TokenShards
from trimaran.runtime.grid import num_microbatches

_NEXT_TOKEN = NextToken()


class _Corpus:
    """The windows of one corpus: sample k is window `permutation of epoch k // n` of `k % n`, with n = `num_samples`.

    Window i is tokens [i * seq_len, i * seq_len + seq_len + 1).
    """

    def __init__(self, shards: TokenShards, seq_len: int, seed: int, *, shuffle: bool) -> None:
        self.num_samples = (shards.num_tokens - 1) // seq_len if shards.num_tokens else 0
        if self.num_samples < 1:
            more = "raise data.held_out_fraction, set train.eval_interval to 0, " if shards.split == "held_out" else ""
            need = f"one sample of train.seq_len ({seq_len}) needs {seq_len + 1}"
            raise DataError(
                f"split {shards.split!r} has {shards.num_tokens} tokens, {need}; "
                f"{more}add text to data.source or lower train.seq_len"
            )
        # The last window must be whole; no sample has these tokens, fewer than seq_len.
        self.unused_tail_tokens = shards.num_tokens - 1 - self.num_samples * seq_len
        self._shards, self._seq_len, self._seed, self._shuffle = shards, seq_len, seed, shuffle

    def windows(self, samples: Int64Array) -> Int64Array:
        """Map sample numbers of the corpus to window numbers: [n] int64 -> [n] int64 in [0, num_samples)."""
        epochs, indices = np.divmod(samples, self.num_samples)
        if not self._shuffle:
            return indices
        windows = np.empty_like(indices)
        # A global batch may cross into the next epoch, or span several where the corpus is tiny.
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            windows[mine] = permute(indices[mine], self.num_samples, self._seed, int(epoch))
        return windows

    def read(self, window: int) -> TokenArray:
        """Return the tokens of a window: [seq_len + 1]."""
        return self._shards.read(window * self._seq_len, self._seq_len + 1)


class Loader:
    """Cuts a split into samples of `seq_len` tokens and deals them to the data-parallel ranks.

    Sample k of the run (counted over all ranks from step 0) is window `permutation of epoch k // n` of `k % n`, with n
    = `num_samples`, or where corpora are blended, that window of the corpus and of the number that `Blend.at` gives.
    Window i is tokens [i * seq_len, i * seq_len + seq_len + 1): its inputs and its next tokens overlap
    by all but one. Documents follow each other within a window, separated by the end-of-text token. The objective
    decides what is predicted of a sample.
    """

    def __init__(
        self,
        shards: TokenShards | Sequence[TokenShards],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        objective: Objective = _NEXT_TOKEN,
        blend: Blend | None = None,
    ) -> None:
        """Check the sizes, which are in sequences; several corpora need a `blend` of as many.

        Raises DataError when the split is shorter than one sample, ValueError for other rules.
        """
        for name, value in (
            ("train.seq_len", seq_len),
            ("train.micro_batch_size", micro_batch_size),
            ("the dp size", dp_size),
        ):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp rank {dp_rank} must be in [0, {dp_size})")
        if not num_microbatches(global_batch_size, micro_batch_size, dp_size):
            rule = f"must be a positive multiple of dp x train.micro_batch_size ({dp_size} x {micro_batch_size})"
            raise ValueError(
                f"train.global_batch_size ({global_batch_size}) {rule}; "
                f"set it to a multiple of {dp_size * micro_batch_size}"
            )
        corpora = [shards] if isinstance(shards, TokenShards) else shards
        self._corpora = [_Corpus(each, seq_len, seed + index, shuffle=shuffle) for index, each in enumerate(corpora)]
        self._blend = blend
        self.num_samples = sum(corpus.num_samples for corpus in self._corpora)
        self.unused_tail_tokens = sum(corpus.unused_tail_tokens for corpus in self._corpora)
        self._seq_len = seq_len
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._dp_rank, self._samples_per_rank = dp_rank, global_batch_size // dp_size
        self._objective = objective

    def num_losses(self, consumed_samples: int) -> None:
        """Return None: every global batch has as many losses, `RunFields.target_tokens_per_step`."""
        return

    def num_tokens(self, consumed_samples: int) -> int:
        """Return the tokens of the global batch that begins at a sample of the run."""
        return self._global_batch_size * self._seq_len

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches of the global batch that begins at sample `consumed_samples` of the run.

        Microbatch m of dp rank r holds samples consumed_samples + r * (global_batch_size / dp) + m * micro_batch_size +
        [0, micro_batch_size). The result depends on the position alone, not on earlier calls.
        """
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples ({consumed_samples}) must not be negative")
        first = consumed_samples + self._dp_rank * self._samples_per_rank
        samples = np.arange(first, first + self._samples_per_rank, dtype=np.int64)
        spans = np.empty((len(samples), self._seq_len + 1), dtype=np.int64)
        which, places = (np.zeros_like(samples), samples) if self._blend is None else self._blend.at(samples)
        for index, corpus in enumerate(self._corpora):
            mine = np.flatnonzero(which == index)
            for row, window in zip(mine, corpus.windows(places[mine]), strict=True):
                spans[row] = corpus.read(int(window))
        size = self._micro_batch_size
        return [
            self._objective.microbatch(spans[start : start + size], samples[start : start + size])
            for start in range(0, self._samples_per_rank, size)
        ]
