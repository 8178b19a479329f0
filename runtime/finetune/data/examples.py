"""Examples as tokens: which of them are learned, and what happens to those that are too long. No torch."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimaran.runtime.finetune.data.records import Origin

Tokens = npt.NDArray[np.int64]
Learned = npt.NDArray[np.bool_]
Truncation = Literal["drop", "left", "right"]


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that attend to each other.

    Args:
        tokens: [n] int64.
        learned: [n] bool, True where the token is a target: the position before it predicts it. The first token has
            none before it, so it is never learned.
    """

    tokens: Tokens
    learned: Learned

    @classmethod
    def of(cls, tokens: Any, learned: Any) -> "Document":
        """Return the document of two sequences of the same length."""
        mask = np.array(learned, dtype=np.bool_)
        if len(mask):
            mask[0] = False
        return cls(np.asarray(tokens, dtype=np.int64), mask)

    @property
    def num_learned(self) -> int:
        """Number of tokens that are learned."""
        return int(np.count_nonzero(self.learned))

    def cut(self, most: int, side: Truncation) -> "Document":
        """Return at most `most` tokens, without those at the end `side` (left or right)."""
        if len(self.tokens) <= most:
            return self
        kept = slice(len(self.tokens) - most, None) if side == "left" else slice(most)
        return Document.of(self.tokens[kept], self.learned[kept])


@dataclass(frozen=True, slots=True)
class Example:
    """Documents that share a row of a batch.

    Args:
        documents: one, or of a pair two: chosen, rejected.
        origin: of the record.
        value: of a pair the margin (0 without one); of a rated answer 1 where it is good, else 0.
        fields: JSON text of the record's other fields, "" where none are kept.
    """

    documents: tuple[Document, ...]
    origin: Origin
    value: float = 0.0
    fields: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(document.tokens) for document in self.documents)

    def fitted(self, most: int, truncation: Truncation) -> "Example | None":
        """Return the example with at most `most` tokens, each document shortened at the same end.

        Of several documents each may have an equal share of `most`, and what the shorter ones leave. None where the
        example is to be dropped: it is too long, or nothing of it would be learned any more though something was.
        """
        if self.num_tokens <= most:
            return self
        if truncation == "drop":
            return None
        shares = _shares([len(document.tokens) for document in self.documents], most)
        pairs = list(zip(self.documents, shares, strict=True))
        documents = tuple(document.cut(share, truncation) for document, share in pairs)
        lost = [
            not after.num_learned and before.num_learned
            for before, after in zip(self.documents, documents, strict=True)
        ]
        return None if any(lost) else Example(documents, self.origin, self.value, self.fields)


def _shares(lengths: list[int], most: int) -> list[int]:
    """Return how many tokens each document may keep, at most `most` in all: the longest ones give up first."""
    shares, left = [0] * len(lengths), most
    for rank, index in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        shares[index] = min(lengths[index], left // (len(lengths) - rank))
        left -= shares[index]
    return shares
