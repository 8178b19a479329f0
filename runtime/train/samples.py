"""The samples of a run: the loader of the training split, blended where there are corpora, and the held-out batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import Group
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.prepare import PreparedData, open_prepared
from trimaran.runtime.data.samples.blend import Blend
from trimaran.runtime.data.samples.epochs import blend_of, check_epochs, corpora_of
from trimaran.runtime.data.samples.loader import Loader
from trimaran.runtime.data.samples.objectives import objective_of
from trimaran.runtime.data.tokens.shards import TokenShards
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.comparable import check_comparable
from trimaran.runtime.finetune.data.loader import ExampleLoader
from trimaran.runtime.finetune.data.packing import row_multiple
from trimaran.runtime.finetune.data.prepare import PreparedExamples, holds_examples, open_examples, rows_of
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.spec import RunSpec

TrainingData: TypeAlias = PreparedData | PreparedExamples
logger = logging.getLogger(__name__)


Split = Literal["train", "held_out"]


class Enriches(Protocol):
    """Adds to the batches of a loader what a method reads beside tokens."""

    def loader(self, loader: ExampleLoader, split: Split) -> "BatchSource":
        """Return the loader with richer batches."""
        ...


class BatchSource(Protocol):
    """Deals the samples of a split to the dp ranks; see `Loader` and `ExampleLoader`."""

    num_samples: int
    unused_tail_tokens: int

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches of the global batch that begins at a sample of the run."""
        ...

    def num_losses(self, consumed_samples: int) -> int | None:
        """Return the losses of that global batch; None where all have as many."""
        ...

    def num_tokens(self, consumed_samples: int) -> int:
        """Return the tokens of that global batch, without padding."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """The fixed global batches of an evaluation.

    Args:
        batches: for each global batch, this dp rank's microbatches; [] where evaluation is off.
        num_losses: of all of them, over all ranks; None: as many as any global batches have.
        members: the examples in them, over all ranks; () for a text.
    """

    batches: list[list[Microbatch]]
    num_losses: int | None = None
    members: Sequence[int] = ()


def open_data(folder: Path, verify: bool = False) -> TrainingData:
    """Open a folder of prepared data: a text, or examples.

    Args:
        verify: whether to check the content of files that have changed since they were last checked.
    """
    return open_examples(folder, verify) if holds_examples(folder) else open_prepared(folder, verify)


def check_data(spec: RunSpec, data: TrainingData) -> None:
    """Raise DataError where the text is too short for the run, or a split has no example. For the time before ranks."""
    first = Group("dp", tuple(range(spec.parallel.dp)), 0)
    train_loader(spec, data, first)
    if isinstance(data, PreparedExamples):
        held_out_of(spec, data, first)
        check_comparable(spec, data.train, data.held_out)
        return
    if spec.data.corpora:
        check_epochs(spec, corpora_of(spec, data.train))
    if spec.train.eval_interval > 0:
        samples = build_loader(spec, data.held_out, data.tokenizer, first).num_samples
        if samples < spec.train.global_batch_size:
            logger.warning(
                "the held-out text has %d samples of train.seq_len (%d) tokens, which are repeated to fill one "
                "train.global_batch_size (%d); raise data.held_out_fraction for an evaluation on more text",
                *(samples, spec.train.seq_len, spec.train.global_batch_size),
            )


def train_loader(spec: RunSpec, data: TrainingData, dp: Group, enriches: Enriches | None = None) -> BatchSource:
    """Return this dp rank's loader over the training split, blended where there are corpora."""
    if isinstance(data, PreparedExamples):
        loader = example_loader(spec, data.train, data.tokenizer, dp, repeats=True)
        return loader if enriches is None else enriches.loader(loader, "train")
    if not spec.data.corpora:
        return build_loader(spec, data.train, data.tokenizer, dp)
    corpora = corpora_of(spec, data.train)
    return build_loader(spec, list(corpora.values()), data.tokenizer, dp, blend=blend_of(spec))


def build_loader(
    spec: RunSpec,
    shards: TokenShards | Sequence[TokenShards],
    tokenizer: Tokenizer,
    dp: Group,
    *,
    shuffle: bool | None = None,
    blend: Blend | None = None,
) -> Loader:
    """Return this dp rank's loader over a split tokenized with `tokenizer`, of several corpora by their blend."""
    return Loader(
        shards,
        seq_len=spec.train.seq_len,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=spec.train.micro_batch_size,
        dp_rank=dp.rank,
        dp_size=dp.size,
        seed=spec.seed,
        shuffle=spec.data.shuffle if shuffle is None else shuffle,
        objective=objective_of(spec, tokenizer),
        blend=blend,
    )


def example_loader(
    spec: RunSpec, examples: ExampleSet, tokenizer: Tokenizer, dp: Group, *, repeats: bool
) -> ExampleLoader:
    """Return this dp rank's loader over a split of examples.

    Args:
        repeats: whether epochs follow each other, shuffled if the spec says so; if not, each example comes once, in
            order.

    Raises:
        DataError: the split is empty.
    """
    assert spec.finetune is not None, "only a run that finetunes has examples"
    if not examples.num_examples:
        more = "raise data.held_out_fraction, set train.eval_interval to 0, or " if not repeats else ""
        raise DataError(f"split {examples.split!r} has no examples; {more}add examples to data.source")
    return ExampleLoader(
        examples,
        rows_of(spec, examples),
        seq_len=spec.train.seq_len,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=spec.train.micro_batch_size,
        dp_rank=dp.rank,
        dp_size=dp.size,
        seed=spec.seed,
        padding_id=tokenizer.eot_id,
        shuffle=repeats and spec.data.shuffle,
        repeats=repeats,
        unit="tokens" if spec.finetune.method == "sft" else "examples",
        row_multiple=row_multiple(spec.parallel.tp),
    )


def held_out_of(spec: RunSpec, data: TrainingData, dp: Group, enriches: Enriches | None = None) -> HeldOut:
    """Return this dp rank's part of the evaluation; without batches where evaluation is off."""
    if not isinstance(data, PreparedExamples):
        return HeldOut(held_out_batches(spec, data, dp))
    if spec.train.eval_interval == 0:
        return HeldOut([])
    loader = example_loader(spec, data.held_out, data.tokenizer, dp, repeats=False)
    size = spec.train.global_batch_size
    starts = [index * size for index in range(min(spec.train.eval_batches, -(-loader.num_samples // size)))]
    dealt: BatchSource = loader if enriches is None else enriches.loader(loader, "held_out")
    members = [example for start in starts for example in loader.examples_at(start)]
    return HeldOut([dealt.microbatches(start) for start in starts], sum(map(loader.num_losses, starts)), members)


def held_out_batches(spec: RunSpec, data: PreparedData, dp: Group) -> list[list[Microbatch]]:
    """Return this dp rank's microbatches of the evaluation's fixed global batches; [] where evaluation is off.

    Held-out text that is shorter than one global batch is repeated to fill it.
    """
    if spec.train.eval_interval == 0:
        return []
    loader = build_loader(spec, data.held_out, data.tokenizer, dp, shuffle=False)
    whole_batches = max(1, loader.num_samples // spec.train.global_batch_size)
    count = min(spec.train.eval_batches, whole_batches)
    return [loader.microbatches(index * spec.train.global_batch_size) for index in range(count)]
