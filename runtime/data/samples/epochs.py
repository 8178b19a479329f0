"""How the corpora of a run share its samples, and how often each is read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.samples.blend import Blend
from trimaran.runtime.data.tokens.shards import TokenShards

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec


def corpora_of(spec: "RunSpec", train: TokenShards) -> dict[str, TokenShards]:
    """Return the tokens for training of each of the spec's corpora, in their order.

    Raises:
        DataError: a corpus has none.
    """
    found = train.of_corpora()
    missing = [name for name in spec.data.corpora if name not in found]
    if missing:
        raise DataError(
            f"data.corpora.{missing[0]} has no text for training: the recipe keeps none of it, and data.html says why; "
            "loosen what removes it, or leave the corpus out"
        )
    return {name: found[name] for name in spec.data.corpora}


def blend_of(spec: "RunSpec") -> Blend:
    """Return the blend of the corpora that the spec names."""
    weights = {name: corpus.weight for name, corpus in spec.data.corpora.items()}
    stages = [(stage.tokens, stage.weights) for stage in spec.data.stages or ()]
    return Blend.of(weights, stages, spec.train.seq_len)


def samples_of(spec: "RunSpec") -> dict[str, int]:
    """Return how many samples the whole run draws from each corpus."""
    drawn = blend_of(spec).count_before(spec.train.num_steps * spec.train.global_batch_size)
    return dict(zip(spec.data.corpora, map(int, drawn), strict=True))


def epochs_of(spec: "RunSpec", corpora: Mapping[str, TokenShards]) -> dict[str, float]:
    """Return how often the whole run reads each corpus."""
    drawn, seq_len = samples_of(spec), spec.train.seq_len
    return {name: drawn[name] / max(1, (shards.num_tokens - 1) // seq_len) for name, shards in corpora.items()}


def check_epochs(spec: "RunSpec", corpora: Mapping[str, TokenShards]) -> None:
    """Raise DataError where a corpus would be read more often than its max_epochs."""
    for name, epochs in epochs_of(spec, corpora).items():
        most = spec.data.corpora[name].max_epochs
        if most is not None and epochs > most:
            raise DataError(
                f"the run would read the corpus {name} {epochs:.2f} times, more than data.corpora.{name}.max_epochs "
                f"({most:g}); lower its weight or train.num_steps, or give it more text"
            )
