"""Gopher, Chinchilla, PaLM and Gemma."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.presets.record import Preset, gpt, llama

_GOPHER: Final = "Rae et al. 2021 (Gopher), table 1"
_CHINCHILLA: Final = "Hoffmann et al. 2022 (Chinchilla), table 4"
_RELATIVE: Final = (
    "positions are rotary here; the published models have Transformer-XL's relative positions, whose projection of "
    "hidden_size ** 2 numbers a layer is part of the published count and of no layer here"
)
_PALM: Final = "Chowdhery et al. 2022 (PaLM), table 1"
_MATRICES: Final = "the published count fits the matrices alone, without the scales of the norms"
_GEMMA: Final = "Gemma Team 2024 (Gemma), tables 1 and 2; the released configuration"
_GEMMA2: Final = "Gemma Team 2024 (Gemma 2), tables 1 and 2; the released configuration"


def _gopher(num_layers: int, hidden_size: int, num_heads: int, source: str, published: str) -> Preset:
    shape = gpt(num_layers, hidden_size, num_heads, vocab_size=32000, position="rotary", norm="rmsnorm")
    return Preset(shape, source, published, besides=num_layers * hidden_size**2, note=_RELATIVE)


def _palm(num_layers: int, hidden_size: int, num_heads: int, published: str) -> Preset:
    """Return PaLM: one key-value head, swish-gated, logits by 1 / sqrt(hidden_size), z-loss (sections 2 and 5)."""
    parts = {
        "num_kv_heads": 1,
        "head_dim": 256,
        "norm": "layernorm",
        "block": "parallel_one_norm",
        "tie_embeddings": True,
    }
    shape = llama(num_layers, hidden_size, num_heads, 4 * hidden_size, vocab_size=256000, **parts)
    # RoFormer's pairs of neighbours, as in Cohere's models, whose architecture a PaLM is exported in.
    rest = {"rotary_interleaved": True, "init": "fan_in", "logits_scale": hidden_size**-0.5, "z_loss": 1e-4}
    return Preset({**shape, **rest}, _PALM, published, besides=-(num_layers + 1) * hidden_size, note=_MATRICES)


def _gemma(
    num_layers: int, hidden_size: int, num_heads: int, kv_heads: int, ffn_hidden_size: int, **changes: Any
) -> dict[str, Any]:
    parts = {
        "num_kv_heads": kv_heads,
        "vocab_size": 256000,
        "max_seq_len": 8192,
        "norm_eps": 1e-6,
        "activation": "geglu_tanh",
    }
    tied = {"tie_embeddings": True, "embedding_scale": hidden_size**0.5}
    return {**llama(num_layers, hidden_size, num_heads, ffn_hidden_size), "head_dim": 256, **parts, **tied, **changes}


def _gemma2(*shape: int, published: str, **changes: Any) -> Preset:
    parts = {
        "norm_position": "sandwich",
        "attention_window": 4096,
        "attention_pattern": ("window", "full"),
        "attention_softcap": 50.0,
    }
    return Preset({**_gemma(*shape), **parts, "logits_softcap": 30.0, **changes}, _GEMMA2, published)


GOOGLE: Final[Mapping[str, Preset]] = {
    "gopher-44m": _gopher(8, 512, 16, _GOPHER, "44M"),
    "gopher-117m": _gopher(12, 768, 12, _GOPHER, "117M"),
    "gopher-417m": _gopher(12, 1536, 12, _GOPHER, "417M"),
    "gopher-1.4b": _gopher(24, 2048, 16, _GOPHER, "1.4B"),
    "gopher-7.1b": _gopher(32, 4096, 32, _GOPHER, "7.1B"),
    "gopher-280b": _gopher(80, 16384, 128, _GOPHER, "280B"),
    "chinchilla-70b": _gopher(80, 8192, 64, _CHINCHILLA, "70B"),
    "palm-8b": _palm(32, 4096, 16, "8.63B"),
    "palm-62b": _palm(64, 8192, 32, "62.50B"),
    "palm-540b": _palm(118, 18432, 48, "540.35B"),
    # The papers count 256,128 rows of embeddings, padding for their hardware; the released weights have the 256,000 of
    # the tokenizer.
    "gemma-2b": Preset(_gemma(18, 2048, 8, 1, 16384), _GEMMA, "2,506,172,416"),
    "gemma-7b": Preset(_gemma(28, 3072, 16, 16, 24576), _GEMMA, "8,537,680,896"),
    "gemma2-2b": _gemma2(26, 2304, 8, 4, 9216, published="2,614,341,888"),
    "gemma2-9b": _gemma2(42, 3584, 16, 8, 14336, published="9,241,705,984"),
    "gemma2-27b": _gemma2(46, 4608, 32, 16, 36864, published="27,227,128,320", head_dim=128, attention_scale=144**-0.5),
}
