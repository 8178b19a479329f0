"""LLaMA 1 to 3 and what grew from it: Mistral, Qwen, OLMo, SmolLM2."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.presets.record import Preset, llama

_LLAMA: Final = "Touvron et al. 2023 (LLaMA), table 2; feed-forward widths and norm_eps from the released params files"
_LLAMA2: Final = "Touvron et al. 2023 (Llama 2), table 1 and appendix A.2.1; the released configuration"
_LLAMA3: Final = "Grattafiori et al. 2024 (Llama 3), table 3; the released configuration"
_MIXTRAL: Final = "Jiang et al. 2024 (Mixtral of Experts), table 1; the released configuration"
_MIXTRAL_22B: Final = "Mistral AI 2024 (Mixtral 8x22B); the released configuration"
_QWEN2: Final = "Yang et al. 2024 (Qwen2), table 1; the released configuration"
_QWEN25: Final = "Qwen Team 2024 (Qwen2.5), table 1; the released configuration"
_QWEN3: Final = "Yang et al. 2025 (Qwen3), table 1; the released configuration"
_OLMO: Final = "Groeneveld et al. 2024 (OLMo), table 1; the released configuration"
_OLMO2: Final = "OLMo Team 2024 (OLMo 2); the released configuration"
_SMOLLM2: Final = "Ben Allal et al. 2025 (SmolLM2); the released configuration"


def _llama2(
    num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, published: str, **changes: Any
) -> Preset:
    return Preset(
        llama(num_layers, hidden_size, num_heads, ffn_hidden_size, max_seq_len=4096, **changes), _LLAMA2, published
    )


def _llama3(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    ffn_hidden_size: int,
    published: str,
    *,
    stretch: float = 1.0,
    tied: bool = False,
) -> Preset:
    """Return a Llama 3 of 8,192 tokens, or of 131,072 by rotary scaling of factor `stretch` (3.1 and later)."""
    changes: dict[str, Any] = {
        "num_kv_heads": 8,
        "vocab_size": 128256,
        "max_seq_len": 8192,
        "rotary_base": 500000.0,
        "tie_embeddings": tied,
    }
    if stretch > 1.0:
        scaling = {
            "kind": "llama3",
            "factor": stretch,
            "original_max_position": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        changes |= {"max_seq_len": 131072, "rotary_scaling": scaling}
    return Preset(llama(num_layers, hidden_size, num_heads, ffn_hidden_size, **changes), _LLAMA3, published)


def _mixtral(*shape: int, max_seq_len: int) -> dict[str, Any]:
    parts = {"num_kv_heads": 8, "num_experts": 8, "experts_per_token": 2, "rotary_base": 1000000.0}
    return {**llama(*shape), **parts, "max_seq_len": max_seq_len}


def _qwen(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, ffn_hidden_size: int, **changes: Any
) -> dict[str, Any]:
    parts = {
        "num_kv_heads": num_kv_heads,
        "vocab_size": 151936,
        "max_seq_len": 32768,
        "rotary_base": 1000000.0,
        "norm_eps": 1e-6,
    }
    return {**llama(num_layers, hidden_size, num_heads, ffn_hidden_size), **parts, **changes}


def _qwen2(*shape: int, source: str, published: str, vocab_size: int = 152064, tied: bool = False) -> Preset:
    return Preset(_qwen(*shape, vocab_size=vocab_size, qkv_bias=True, tie_embeddings=tied), source, published)


def _qwen3(*shape: int, published: str, tied: bool = False) -> Preset:
    return Preset(
        _qwen(*shape, max_seq_len=40960, head_dim=128, query_key_norm="head", tie_embeddings=tied), _QWEN3, published
    )


def _olmo2(num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, published: str) -> Preset:
    parts = {"vocab_size": 100352, "max_seq_len": 4096, "rotary_base": 500000.0, "norm_eps": 1e-6}
    shape = llama(
        num_layers, hidden_size, num_heads, ffn_hidden_size, norm_position="branch", query_key_norm="width", **parts
    )
    return Preset(shape, _OLMO2, published)


def _olmo(
    num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, published: str, *, tied: bool
) -> Preset:
    parts = {"vocab_size": 50304, "norm": "layernorm", "norm_weight": False, "tie_embeddings": tied}
    return Preset(llama(num_layers, hidden_size, num_heads, ffn_hidden_size, **parts), _OLMO, published)


def _smollm2(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    kv_heads: int,
    ffn_hidden_size: int,
    published: str,
    rotary_base: float,
) -> Preset:
    parts = {
        "num_kv_heads": kv_heads,
        "vocab_size": 49152,
        "max_seq_len": 8192,
        "rotary_base": rotary_base,
        "tie_embeddings": True,
    }
    return Preset(llama(num_layers, hidden_size, num_heads, ffn_hidden_size, **parts), _SMOLLM2, published)


LLAMA_LIKE: Final[Mapping[str, Preset]] = {
    "llama-7b": Preset(llama(32, 4096, 32, 11008, norm_eps=1e-6), _LLAMA, "6,738,415,616"),
    "llama-13b": Preset(llama(40, 5120, 40, 13824, norm_eps=1e-6), _LLAMA, "13,015,864,320"),
    "llama-30b": Preset(llama(60, 6656, 52, 17920, norm_eps=1e-6), _LLAMA, "32,528,943,616"),
    # Table 2 prints 65.2B for it.
    "llama-65b": Preset(llama(80, 8192, 64, 22016), _LLAMA, "65,285,660,672"),
    "llama2-7b": _llama2(32, 4096, 32, 11008, "6,738,415,616"),
    "llama2-13b": _llama2(40, 5120, 40, 13824, "13,015,864,320"),
    "llama2-70b": _llama2(80, 8192, 64, 28672, "68,976,648,192", num_kv_heads=8),
    "llama3-8b": _llama3(32, 4096, 32, 14336, "8,030,261,248"),
    "llama3-70b": _llama3(80, 8192, 64, 28672, "70,553,706,496"),
    "llama3-405b": _llama3(126, 16384, 128, 53248, "405,853,388,800"),
    "llama3.1-8b": _llama3(32, 4096, 32, 14336, "8,030,261,248", stretch=8.0),
    "llama3.1-70b": _llama3(80, 8192, 64, 28672, "70,553,706,496", stretch=8.0),
    "llama3.1-405b": _llama3(126, 16384, 128, 53248, "405,853,388,800", stretch=8.0),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, "1,235,814,400", stretch=32.0, tied=True),
    "llama3.2-3b": _llama3(28, 3072, 24, 8192, "3,212,749,824", stretch=32.0, tied=True),
    "mistral-7b": Preset(
        llama(32, 4096, 32, 14336, num_kv_heads=8, max_seq_len=8192, attention_window=4096),
        "Jiang et al. 2023 (Mistral 7B), table 1",
        "7,241,732,096",
    ),
    "mixtral-8x7b": Preset(_mixtral(32, 4096, 32, 14336, max_seq_len=32768), _MIXTRAL, "46,702,792,704"),
    "mixtral-8x22b": Preset(_mixtral(56, 6144, 48, 16384, max_seq_len=65536), _MIXTRAL_22B, "140,620,634,112"),
    "qwen2-0.5b": _qwen2(24, 896, 14, 2, 4864, source=_QWEN2, published="494,032,768", vocab_size=151936, tied=True),
    "qwen2-1.5b": _qwen2(28, 1536, 12, 2, 8960, source=_QWEN2, published="1,543,714,304", vocab_size=151936, tied=True),
    "qwen2-7b": _qwen2(28, 3584, 28, 4, 18944, source=_QWEN2, published="7,615,616,512"),
    "qwen2-72b": _qwen2(80, 8192, 64, 8, 29568, source=_QWEN2, published="72,706,203,648"),
    "qwen2.5-3b": _qwen2(
        36, 2048, 16, 2, 11008, source=_QWEN25, published="3,085,938,688", vocab_size=151936, tied=True
    ),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13824, source=_QWEN25, published="14,770,033,664"),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648, source=_QWEN25, published="32,763,876,352"),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, published="596,049,920", tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144, published="1,720,574,976", tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728, published="4,022,468,096", tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288, published="8,190,735,360"),
    "qwen3-14b": _qwen3(40, 5120, 40, 8, 17408, published="14,768,307,200"),
    "qwen3-32b": _qwen3(64, 5120, 64, 8, 25600, published="32,762,123,264"),
    "olmo-1b": _olmo(16, 2048, 16, 8192, "1,176,764,416", tied=True),
    "olmo-7b": _olmo(32, 4096, 32, 11008, "6,888,095,744", tied=False),
    "olmo2-7b": _olmo2(32, 4096, 32, 11008, "7,298,617,344"),
    "olmo2-13b": _olmo2(40, 5120, 40, 13824, "13,716,198,400"),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536, "134,515,008", 100000.0),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560, "361,821,120", 100000.0),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, "1,711,376,384", 130000.0),
}
