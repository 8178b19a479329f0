"""The samples of a run: the loader of the training split, blended where there are corpora, and the held-out batches."""

import logging
from collections.abc import Sequence

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import Group
from trimaran.runtime.data.prepare import PreparedData
from trimaran.runtime.data.samples.blend import Blend
from trimaran.runtime.data.samples.epochs import blend_of, check_epochs, corpora_of
from trimaran.runtime.data.samples.loader import Loader
from trimaran.runtime.data.samples.objectives import objective_of
from trimaran.runtime.data.tokens.shards import TokenShards
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import RunSpec

logger = logging.getLogger(__name__)


def check_data(spec: RunSpec, data: PreparedData) -> None:
    """Raise DataError where the text is too short for the run. Called before any rank starts."""
    first = Group("dp", tuple(range(spec.parallel.dp)), 0)
    train_loader(spec, data, first)
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


def train_loader(spec: RunSpec, data: PreparedData, dp: Group) -> Loader:
    """Return this dp rank's loader over the training split, blended where there are corpora."""
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
