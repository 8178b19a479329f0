"""Microbatches as a pure function of the position in the run: resuming needs no state, any dp sees the same samples."""

from collections.abc import Sequence

import numpy as np

from trimaran.models.batch import Microbatch
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import Int64Array
from trimaran.runtime.data.samples.blend import Blend
from trimaran.runtime.data.samples.dealing import Deal, in_epochs
from trimaran.runtime.data.samples.objectives import NextToken, Objective
from trimaran.runtime.data.tokens.shards import TokenArray, TokenShards

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
        return in_epochs(samples, self.num_samples, self._seed, shuffle=self._shuffle)[1]

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
        if seq_len < 1:
            raise ValueError(f"train.seq_len ({seq_len}) must be at least 1")
        self._deal = Deal(global_batch_size, micro_batch_size, dp_rank, dp_size)
        corpora = [shards] if isinstance(shards, TokenShards) else shards
        self._corpora = [_Corpus(each, seq_len, seed + index, shuffle=shuffle) for index, each in enumerate(corpora)]
        self._blend = blend
        self.num_samples = sum(corpus.num_samples for corpus in self._corpora)
        self.unused_tail_tokens = sum(corpus.unused_tail_tokens for corpus in self._corpora)
        self._seq_len, self._objective = seq_len, objective

    def num_losses(self, consumed_samples: int) -> None:
        """Return None: every global batch has as many losses, `RunFields.target_tokens_per_step`."""
        return

    def num_tokens(self, consumed_samples: int) -> int:
        """Return the tokens of the global batch that begins at a sample of the run."""
        return self._deal.global_batch_size * self._seq_len

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches of the global batch that begins at sample `consumed_samples` of the run.

        `Deal.of_rank` says which samples each holds. The result depends on the position alone, not on earlier calls.
        """
        samples = self._deal.of_rank(consumed_samples)
        spans = np.empty((len(samples), self._seq_len + 1), dtype=np.int64)
        which, places = (np.zeros_like(samples), samples) if self._blend is None else self._blend.at(samples)
        for index, corpus in enumerate(self._corpora):
            mine = np.flatnonzero(which == index)
            for row, window in zip(mine, corpus.windows(places[mine]), strict=True):
                spans[row] = corpus.read(int(window))
        return [self._objective.microbatch(spans[place], samples[place]) for place in self._deal.microbatches()]
