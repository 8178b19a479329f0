"""The families that can be imported and exported."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.bert import BERT
from trimaran.models.huggingface.bloom import BLOOM
from trimaran.models.huggingface.falcon import FALCON
from trimaran.models.huggingface.family import CannotExpress, Family, canonical_config
from trimaran.models.huggingface.gemma import GEMMA
from trimaran.models.huggingface.gemma2 import GEMMA2
from trimaran.models.huggingface.gpt2 import GPT2
from trimaran.models.huggingface.gpt_neo import GPT_NEO
from trimaran.models.huggingface.gpt_neox import GPT_NEOX
from trimaran.models.huggingface.gptj import GPTJ
from trimaran.models.huggingface.llama import LLAMA
from trimaran.models.huggingface.mistral import MISTRAL
from trimaran.models.huggingface.mixtral import MIXTRAL
from trimaran.models.huggingface.olmo import OLMO
from trimaran.models.huggingface.olmo2 import OLMO2
from trimaran.models.huggingface.opt import OPT
from trimaran.models.huggingface.options import shown
from trimaran.models.huggingface.palm import PALM
from trimaran.models.huggingface.qwen2 import QWEN2
from trimaran.models.huggingface.qwen3 import QWEN3
from trimaran.models.huggingface.starcoder2 import STARCODER2
from trimaran.models.huggingface.xlnet import XLNET

# The most widely readable families come first: `family_for` takes the first of several equally close ones.
FAMILIES: Final[tuple[Family, ...]] = (
    LLAMA,
    GPT2,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    GPT_NEOX,
    FALCON,
    GPTJ,
    GPT_NEO,
    GEMMA,
    GEMMA2,
    OLMO,
    OLMO2,
    BLOOM,
    OPT,
    PALM,
    STARCODER2,
    BERT,
    XLNET,
)


def family_of(hf: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names.

    Raises:
        ValueError: the family is unknown; the text lists the known ones.
    """
    wanted = hf.get("model_type")
    for family in FAMILIES:
        if wanted in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    if wanted is None:
        raise ValueError(f"config.json has no model_type; this runtime knows {known}")
    raise ValueError(f"model_type {shown(wanted)} is not known; this runtime knows {known}")


def family_for(config: TransformerConfig) -> Family:
    """Return the family for the export of a model: of those that express it, the one whose default model is closest.

    Raises:
        ValueError: no family expresses it; the text names the differences from the closest two.
    """
    fitting: list[Family] = []
    reasons: list[CannotExpress] = []
    for family in FAMILIES:
        try:
            family.from_config(config)
        except CannotExpress as error:
            reasons.append(error)
        else:
            fitting.append(family)
    if not fitting:
        nearest = sorted(reasons, key=lambda reason: reason.num_differences)[:2]
        raise ValueError(
            "no architecture of Hugging Face that this runtime knows is this model\n" + "\n".join(map(str, nearest))
        )
    return min(fitting, key=lambda family: _unlikeness(family, config))


def _unlikeness(family: Family, config: TransformerConfig) -> int:
    """Return how many words and switches differ from the family's default model; numbers are sizes and do not count."""
    usual = canonical_config(TransformerConfig.model_validate(family.to_config({})))
    return sum(
        value != usual.get(name) for name, value in canonical_config(config).items() if isinstance(value, bool | str)
    )
