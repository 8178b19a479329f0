"""How the samples of a run are dealt: the order of every epoch, and which samples a dp rank has of a global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trimaran.runtime.data.permutation import Int64Array, permute
from trimaran.runtime.grid import num_microbatches


@dataclass(frozen=True)
class Deal:
    """The sizes of batches, in samples, and the dp rank that they are dealt to.

    Raises ValueError on construction where a rule is broken.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        for name, value in (("train.micro_batch_size", self.micro_batch_size), ("the dp size", self.dp_size)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp rank {self.dp_rank} must be in [0, {self.dp_size})")
        if not num_microbatches(self.global_batch_size, self.micro_batch_size, self.dp_size):
            factors = f"{self.dp_size} x {self.micro_batch_size}"
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be a positive multiple of dp x "
                f"train.micro_batch_size ({factors}); set it to a multiple of {self.dp_size * self.micro_batch_size}"
            )

    def of_batch(self, consumed_samples: int) -> Int64Array:
        """Return the samples [global_batch_size] of the global batch that begins at a sample of the run."""
        return np.arange(consumed_samples, consumed_samples + self.global_batch_size, dtype=np.int64)

    def of_rank(self, consumed_samples: int) -> Int64Array:
        """Return this rank's samples [global_batch_size / dp] of that batch.

        Microbatch m of dp rank r holds samples consumed_samples + r * (global_batch_size / dp) + m * micro_batch_size +
        [0, micro_batch_size).
        """
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples ({consumed_samples}) must not be negative")
        size = self.global_batch_size // self.dp_size
        first = consumed_samples + self.dp_rank * size
        return np.arange(first, first + size, dtype=np.int64)

    def microbatches(self) -> Iterator[slice]:
        """Yield the place of each microbatch among a rank's samples."""
        for start in range(0, self.global_batch_size // self.dp_size, self.micro_batch_size):
            yield slice(start, start + self.micro_batch_size)


def in_epochs(samples: Int64Array, num_samples: int, seed: int, *, shuffle: bool) -> tuple[Int64Array, Int64Array]:
    """Map samples of a run, [n], to their epochs, [n], and places in [0, num_samples), [n], in another order each."""
    epochs, places = np.divmod(samples, num_samples)
    if shuffle:
        # A global batch may cross into the next epoch, or span several where there are few samples.
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            places[mine] = permute(places[mine], num_samples, seed, int(epoch))
    return epochs, places
