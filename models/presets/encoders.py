"""Encoders: BERT."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.presets.record import Preset, gpt

_BERT: Final = (
    "Devlin et al. 2019 (BERT), section 3; count of bert-{size}-uncased as a masked language model in transformers"
)
_BERT_NOTE: Final = (
    "the masked language model alone: the pooler and the head for the next sentence are left out, "
    "which the paper counts to 110M and 340M"
)


def _bert(num_layers: int, hidden_size: int, num_heads: int, published: str, size: str) -> Preset:
    changes: dict[str, Any] = {
        "vocab_size": 30522,
        "max_seq_len": 512,
        "objective": "masked_lm",
        "num_token_types": 2,
        "embedding_norm": True,
        "norm_position": "post",
        "norm_eps": 1e-12,
        "activation": "gelu",
        "head_transform": True,
        "head_bias": True,
        "init": "normal",
    }
    return Preset(
        gpt(num_layers, hidden_size, num_heads, **changes), _BERT.format(size=size), published, note=_BERT_NOTE
    )


ENCODERS: Final[Mapping[str, Preset]] = {
    "bert-base": _bert(12, 768, 12, "109,514,298", "base"),
    "bert-large": _bert(24, 1024, 16, "335,174,458", "large"),
}
