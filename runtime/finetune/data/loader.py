"""Microbatches of examples as a pure function of the position in the run; see `runtime/data/samples/loader.py`."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trimaran.kernels.attention import Documents
from trimaran.models.batch import Microbatch
from trimaran.runtime.data.permutation import Int64Array
from trimaran.runtime.data.samples.dealing import Deal, in_epochs
from trimaran.runtime.finetune.data.examples import Document
from trimaran.runtime.finetune.data.packing import ROW_MULTIPLE, Rows

Unit = Literal["tokens", "examples"]
_NO_LABEL = -100


class Examples(Protocol):
    """What a loader reads of examples, from `store.ExampleSet` or from memory.

    Attributes:
        example_lengths: [examples] int64, tokens of each.
        num_learned: [examples] int64, learned tokens of each.
        values: [examples] float64; see `Example`.
    """

    @property
    def example_lengths(self) -> Int64Array: ...

    @property
    def num_learned(self) -> Int64Array: ...

    @property
    def values(self) -> npt.NDArray[np.float64]: ...

    def documents_of(self, example: int) -> range:
        """Return the numbers of an example's documents."""
        ...

    def document(self, number: int) -> Document:
        """Return a document by its number."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExampleBatch(Microbatch):
    """Rows of packed documents of examples.

    The rest of a row is padding: one more document, without labels, which `spans` leaves out.

    Args:
        spans: [documents, 2] int64, first token of each document and the end after its last one in the flattened
            [batch * seq] tokens. The documents of an example follow each other in one row.
        document_numbers: [documents] int64, the number of each in its split.
        values: [examples] float64; see `Example`.
        tokens_per_loss: learned tokens of the global batch over its examples.
    """

    spans: torch.Tensor
    document_numbers: torch.Tensor
    values: torch.Tensor
    tokens_per_loss: float


class ExampleLoader:
    """Deals rows of examples to the data-parallel ranks.

    Sample k of the run (counted over all ranks from step 0) is row `permutation of epoch k // n` of `k % n`, with n
    = `num_samples`, the rows of the split. The rows of a global batch are as long as its longest needs, on every rank:
    one example a row is far from `seq_len` in most batches.
    """

    def __init__(
        self,
        examples: Examples,
        rows: Rows,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        padding_id: int,
        shuffle: bool = True,
        repeats: bool = True,
        unit: Unit = "tokens",
        row_multiple: int = ROW_MULTIPLE,
    ) -> None:
        """Check the sizes, which are in rows.

        Args:
            rows: the examples of each row, at most `seq_len` tokens; see `pack`.
            padding_id: the token that fills a row; nothing attends to it but padding.
            repeats: whether the rows are repeated for ever; if not, samples from `num_samples` on have no labels, and
                count nothing.
            unit: what has a loss: each learned token, or each example.
            row_multiple: what the length of a global batch's rows is a multiple of, where it is not `seq_len`.
        Raises ValueError where a rule is broken.
        """
        self._deal = Deal(global_batch_size, micro_batch_size, dp_rank, dp_size)
        if not rows:
            raise ValueError("the loader needs at least one row")
        self.num_samples, self._rows, self.examples = len(rows), rows, examples
        self.unused_tail_tokens = 0
        self._seq_len, self._padding_id, self._seed = seq_len, padding_id, seed
        self._shuffle, self._repeats, self._unit, self._multiple = shuffle, repeats, unit, row_multiple
        self._learned = np.array([examples.num_learned[list(row)].sum() for row in rows], dtype=np.int64)
        self._sizes = np.array([len(row) for row in rows], dtype=np.int64)
        self._tokens = np.array([examples.example_lengths[list(row)].sum() for row in rows], dtype=np.int64)

    def rows_of(self, samples: Int64Array) -> Int64Array:
        """Map samples of the run to rows: [n] int64 -> [n] int64 in [0, num_samples); -1 for samples without labels."""
        epochs, indices = in_epochs(samples, self.num_samples, self._seed, shuffle=self._shuffle)
        return indices if self._repeats else np.where(epochs == 0, indices, -1)

    def num_losses(self, consumed_samples: int, unit: Unit | None = None) -> int:
        """Return the learned tokens, or the examples, of the global batch that begins at a sample of the run.

        Args:
            unit: which of them; None for the loader's.
        """
        return self._count(self._learned if (unit or self._unit) == "tokens" else self._sizes, consumed_samples)

    def num_tokens(self, consumed_samples: int) -> int:
        """Return the tokens of the global batch that begins at a sample of the run, without padding."""
        return self._count(self._tokens, consumed_samples)

    def examples_at(self, consumed_samples: int) -> list[int]:
        """Return the numbers of the examples of the global batch that begins at a sample of the run."""
        rows = self.rows_of(self._deal.of_batch(consumed_samples))
        return [example for row in rows.tolist() for example in self._members(row)]

    def _count(self, counts: Int64Array, consumed_samples: int) -> int:
        rows = self.rows_of(self._deal.of_batch(consumed_samples))
        return int(counts[rows[rows >= 0]].sum())

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches (ExampleBatch) of the global batch that begins at sample `consumed_samples`.

        `Deal.of_rank` says which samples each holds. The result depends on the position alone.
        """
        samples = self._deal.of_rank(consumed_samples)
        rows, length = self.rows_of(samples), self._length(consumed_samples)
        ratio = self.num_losses(consumed_samples, "tokens") / max(1, self.num_losses(consumed_samples, "examples"))
        return [
            self._microbatch(rows[place].tolist(), length, int(samples[place.start]), ratio)
            for place in self._deal.microbatches()
        ]

    def _length(self, consumed_samples: int) -> int:
        """Return the tokens of each row, padding included, of the global batch that begins at a sample of the run."""
        rows = self.rows_of(self._deal.of_batch(consumed_samples))
        longest = int(self._tokens[rows[rows >= 0]].max(initial=1))
        return min(self._seq_len, -(-longest // self._multiple) * self._multiple)

    def _microbatch(self, rows: list[int], seq: int, first_sample: int, tokens_per_loss: float) -> ExampleBatch:
        batch = len(rows)
        tokens = np.full(batch * seq, self._padding_id, dtype=np.int64)
        labels = np.full(batch * seq, _NO_LABEL, dtype=np.int64)
        positions = np.zeros(batch * seq, dtype=np.int64)
        spans: list[tuple[int, int]] = []
        numbers: list[int] = []
        starts: list[int] = []
        for place, row in enumerate(rows):
            at = place * seq
            for number in (each for example in self._members(row) for each in self.examples.documents_of(example)):
                end = _put(self.examples.document(number), at, tokens, labels, positions)
                spans.append((at, end))
                numbers.append(number)
                starts.append(at)
                at = end
            if at < (place + 1) * seq:
                positions[at : (place + 1) * seq] = np.arange((place + 1) * seq - at)
                starts.append(at)
        ends = [*starts[1:], batch * seq]
        longest = max(end - start for start, end in zip(starts, ends, strict=True))
        values = [float(self.examples.values[example]) for row in rows for example in self._members(row)]
        return ExampleBatch(
            torch.from_numpy(tokens).view(batch, seq),
            torch.from_numpy(labels).view(batch, seq),
            first_sample,
            documents=Documents(torch.tensor([*starts, batch * seq], dtype=torch.int32), longest),
            positions=torch.from_numpy(positions).view(batch, seq),
            spans=torch.tensor(spans, dtype=torch.int64).view(-1, 2),
            document_numbers=torch.tensor(numbers, dtype=torch.int64),
            values=torch.tensor(values, dtype=torch.float64),
            tokens_per_loss=tokens_per_loss,
        )

    def _members(self, row: int) -> tuple[int, ...]:
        return self._rows[row] if row >= 0 else ()


def _put(document: Document, at: int, tokens: Int64Array, labels: Int64Array, positions: Int64Array) -> int:
    """Write a document at a place of flattened rows; return its end."""
    size = len(document.tokens)
    end = at + size
    tokens[at:end] = document.tokens
    positions[at:end] = np.arange(size)
    labels[at : end - 1] = np.where(document.learned[1:], document.tokens[1:], _NO_LABEL)
    return end
