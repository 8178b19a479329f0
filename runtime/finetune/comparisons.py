"""What methods that compare answers add to a run: their batches, and what comes before training and before a step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Criterion
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.comparable import compares
from trimaran.runtime.finetune.criteria import KTO, ORPO, criterion_of
from trimaran.runtime.finetune.criteria.batch import ComparisonBatch, document_log_probs
from trimaran.runtime.finetune.data.loader import ExampleBatch, ExampleLoader, Unit
from trimaran.runtime.finetune.data.prepare import PreparedExamples
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.finetune.documents import Documents
from trimaran.runtime.finetune.forward import ForwardPass, document_values
from trimaran.runtime.finetune.mismatch import mismatched
from trimaran.runtime.finetune.reference import Reference, reference_log_probs
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.samples import BatchSource, Split
from trimaran.runtime.train.train_context import TrainContext

Values = npt.NDArray[np.float64]
SPLITS: Final[tuple[Split, ...]] = ("train", "held_out")


class ComparisonLoader:
    """Deals the rows of an ExampleLoader with what their comparison needs beside the model.

    Args:
        reference: [documents] of the split, see ComparisonBatch; None for a loss without a reference.
    """

    def __init__(self, loader: ExampleLoader, examples: ExampleSet, reference: Values | None) -> None:
        self._loader, self._examples, self._reference = loader, examples, reference
        self.num_samples, self.unused_tail_tokens = loader.num_samples, loader.unused_tail_tokens

    def num_losses(self, consumed_samples: int, unit: Unit = "examples") -> int:
        """See ExampleLoader."""
        return self._loader.num_losses(consumed_samples, unit)

    def num_tokens(self, consumed_samples: int) -> int:
        """See ExampleLoader."""
        return self._loader.num_tokens(consumed_samples)

    def examples_at(self, consumed_samples: int) -> list[int]:
        """See ExampleLoader."""
        return self._loader.examples_at(consumed_samples)

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches (ComparisonBatch); see ExampleLoader."""
        members = self.examples_at(consumed_samples)
        firsts = [self._examples.documents_of(example).start for example in members]
        count = max(1, len(members))
        ratio = float(self._examples.document_learned[firsts].sum()) / count
        share = float((self._examples.values[members] > 0).sum()) / count
        return [self._compared(batch, ratio, share) for batch in self._loader.microbatches(consumed_samples)]

    def _compared(self, batch: Microbatch, first_tokens_per_loss: float, good_share: float) -> ComparisonBatch:
        assert isinstance(batch, ExampleBatch)
        values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
        numbers = batch.document_numbers.numpy()
        reference = np.zeros(len(numbers)) if self._reference is None else self._reference[numbers]
        return ComparisonBatch(
            **values,
            reference=torch.from_numpy(reference),
            first_tokens_per_loss=max(first_tokens_per_loss, 1e-9),
            good_share=good_share,
        )


@dataclass(eq=False)
class Comparisons:
    """A run that learns from comparisons of answers.

    Args:
        examples: of each split.
        tokenizer: of the data.
    """

    spec: RunSpec
    examples: dict[Split, ExampleSet]
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        criterion = criterion_of(self.spec)
        assert criterion is not None, "the method compares no answers"
        self.criterion: Criterion = criterion
        self._reference: dict[str, Values] = {}
        self._mismatched: dict[Split, Documents] = {}
        if isinstance(criterion, KTO):
            length = self.spec.train.seq_len
            self._mismatched = {name: mismatched(each, length) for name, each in self._filled()}

    def _filled(self) -> list[tuple[Split, ExampleSet]]:
        return [(name, self.examples[name]) for name in SPLITS if self.examples[name].num_examples]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probabilities of a reference."""
        return self.spec.finetune is not None and (
            self.spec.finetune.method == "preference" and not isinstance(self.criterion, ORPO)
        )

    def begin(self, train_context: TrainContext, *, resumed: bool) -> str:
        """Compute the log-probabilities of the reference, or read them; return a sentence about it, "" for none.

        Comes before the run's weights are loaded: afterwards the weights are the reference's. Collective over the
        world; raises as `reference_log_probs`.
        """
        if not self.needs_reference:
            return ""
        documents: dict[str, Documents] = {name: documents_of(each) for name, each in self._filled()}
        documents |= {f"{name}_mismatched": each for name, each in self._mismatched.items()}
        digests = [info["sha256"] for _, each in self._filled() for info in each.record["shards"]]
        reference: Reference = reference_log_probs(train_context, documents, digests, self.tokenizer, resumed=resumed)
        self._reference = dict(reference.values)
        return reference.told

    def loader(self, loader: ExampleLoader, split: Split) -> ComparisonLoader:
        """Return the loader of a split whose batches can be compared; after `begin`."""
        return ComparisonLoader(loader, self.examples[split], self._reference.get(split))

    def before_step(self, train_context: TrainContext, loader: BatchSource, consumed_samples: int) -> None:
        """Set what the losses of the global batch that begins at a sample have in common. Collective over the world.

        Args:
            loader: that of the training split, which `loader` has returned.
        """
        if isinstance(self.criterion, KTO):
            assert isinstance(loader, ComparisonLoader), type(loader)
            self._set_divergence(self.criterion, train_context, "train", loader.examples_at(consumed_samples))

    def before_evaluation(self, train_context: TrainContext, members: Sequence[int]) -> None:
        """Set what the losses of held-out examples have in common. Collective over the world.

        Args:
            members: the examples that are evaluated.
        """
        if isinstance(self.criterion, KTO):
            self._set_divergence(self.criterion, train_context, "held_out", members)

    def _set_divergence(
        self, criterion: KTO, train_context: TrainContext, split: Split, members: Sequence[int]
    ) -> None:
        chosen = self._mismatched[split]
        documents = Documents(chosen.example_lengths[list(members)], lambda number: chosen.document(members[number]))
        found = document_values(ForwardPass.of(train_context), documents, document_log_probs)
        ratios = found - self._reference[f"{split}_mismatched"][list(members)]
        criterion.divergence = max(0.0, float(ratios.mean()) if len(ratios) else 0.0)


def comparisons_of(spec: RunSpec, data: object) -> Comparisons | None:
    """Return what a run that compares answers adds to training; None for another run."""
    if not compares(spec):
        return None
    assert isinstance(data, PreparedExamples), type(data)
    return Comparisons(spec, {"train": data.train, "held_out": data.held_out}, data.tokenizer)


def documents_of(examples: ExampleSet) -> Documents:
    """Return all documents of a split, each by itself."""
    return Documents(examples.document_lengths, examples.document)
