"""Documents by number, each an example of its own: what is read without being compared."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.permutation import Int64Array
from trimaran.runtime.finetune.data.examples import Document


class Documents:
    """Documents made when they are read.

    Args:
        lengths: [documents], tokens of each.
        read: returns a document by its number.
    """

    def __init__(self, lengths: Int64Array, read: Callable[[int], Document]) -> None:
        self.example_lengths, self.document = np.asarray(lengths, dtype=np.int64), read
        # Nobody counts losses of these: what they are read for is a number of each.
        self.num_learned: Int64Array = np.ones(len(self.example_lengths), dtype=np.int64)
        self.values: npt.NDArray[np.float64] = np.zeros(len(self.example_lengths))

    def __len__(self) -> int:
        return len(self.example_lengths)

    def documents_of(self, example: int) -> range:
        """Return the number of the one document of an example."""
        return range(example, example + 1)

    @classmethod
    def of(cls, documents: list[Document]) -> "Documents":
        """Return documents that are in memory."""
        return cls(np.array([len(each.tokens) for each in documents], dtype=np.int64), documents.__getitem__)
