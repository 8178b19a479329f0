"""Models with a score head in the format of Hugging Face: a reward model is a classifier of one label."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import SAME
from trimaran.models.huggingface.weights import WeightMap
from trimaran.models.layers.score import SCORE_WEIGHT
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.transformers_adapter import has_class, require_transformers

_ENDINGS: Final = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER: Final = "ForSequenceClassification"


def without_scores(config: TransformerConfig) -> TransformerConfig:
    """Return the model with a projection to the vocabulary alone, which a family describes."""
    return config.model_copy(update={"score_head": "none"})


def architecture_of(family: Family, config: TransformerConfig) -> str:
    """Return transformers' class of a model; of a reward model the classifier of its family.

    Raises:
        ConversionError: transformers has none.
    """
    if config.has_head:
        return family.architecture
    base = family.architecture
    for ending in _ENDINGS:
        base = base.removesuffix(ending)
    name = base + _CLASSIFIER
    require_transformers()
    if not has_class(name):
        raise ConversionError(
            f"transformers has no {name}, so a reward model of family {family.name} is none of Hugging Face's; "
            "`trimaran score` reads the run itself"
        )
    return name


def is_classifier(content: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a classifier of one label, which is a reward model.

    Raises:
        ValueError: it has other labels.
    """
    named = content.get("architectures")
    if not isinstance(named, list) or not named or not str(named[0]).endswith(_CLASSIFIER):
        return False
    labels = content.get("id2label")
    count = len(labels) if isinstance(labels, dict) else content.get("num_labels", 2)  # transformers' default
    if count != 1:
        raise ValueError(f"the model is a {named[0]} of {count} labels, and only one of 1 label is a reward model")
    return True


def units_of(units: Sequence[WeightMap], config: TransformerConfig) -> list[WeightMap]:
    """Return the units of a model of `config` from those of `without_scores(config)`."""
    shapes = parameter_shapes(config)
    kept = [unit for unit in units if all(name in shapes for name in unit.ours)]
    if config.has_head:
        return kept
    return [*kept, WeightMap((SCORE_WEIGHT,), (SCORE_WEIGHT,), SAME, (shapes[SCORE_WEIGHT],))]


def classifier_keys(config: TransformerConfig, architecture: str, ids: dict[str, Any]) -> dict[str, Any]:
    """Return what a reward model's config.json has beside its family's.

    A classifier of transformers reads the score at the last token that is not padding. Where padding and the end of a
    text are one token, it would read the one before, so such a token is not named: batches of one need none.
    """
    if config.has_head:
        return {}
    pad, ends = ids.get("pad_token_id"), ids.get("eos_token_id")
    is_end = pad in (ends if isinstance(ends, list) else [ends])
    labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return {"architectures": [architecture], **labels, "pad_token_id": None if is_end else pad}
