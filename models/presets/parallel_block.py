"""GPT-J, GPT-NeoX, Pythia and Falcon: blocks in which attention and feed-forward read the same stream."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.presets.record import Preset, gpt

_PYTHIA: Final = "Biderman et al. 2023 (Pythia), table 1"
_FALCON: Final = "Almazrouei et al. 2023 (Falcon); the released configuration"
_FALCON_NOTE: Final = "the released files store the matrix that embedding and head share twice"


def _neox(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """Two norms, and the first quarter of every head rotated (Black et al. 2022, section 2.1)."""
    parts = {"position": "rotary", "rotary_dim": hidden_size // num_heads // 4, "block": "parallel"}
    return gpt(num_layers, hidden_size, num_heads, activation="gelu", tie_embeddings=False, **parts, **changes)


def _pythia(num_layers: int, hidden_size: int, num_heads: int, published: str, vocab_size: int = 50304) -> Preset:
    return Preset(_neox(num_layers, hidden_size, num_heads, vocab_size=vocab_size), _PYTHIA, published)


def _falcon(num_layers: int, num_heads: int, num_kv_heads: int, block: str, published: str) -> Preset:
    hidden_size, vocab_size = 64 * num_heads, 65024
    parts = {
        "num_kv_heads": num_kv_heads,
        "position": "rotary",
        "block": block,
        "activation": "gelu",
        "bias": False,
        "norm_bias": True,
    }
    shape = gpt(num_layers, hidden_size, num_heads, vocab_size=vocab_size, **parts)
    return Preset(shape, _FALCON, published, besides=vocab_size * hidden_size, note=_FALCON_NOTE)


PARALLEL_BLOCK: Final[Mapping[str, Preset]] = {
    "gptj-6b": Preset(
        {
            **gpt(28, 4096, 16, vocab_size=50400, tie_embeddings=False, block="parallel_one_norm"),
            "position": "rotary",
            "rotary_dim": 64,
            "rotary_interleaved": True,
            "qkv_bias": False,
            "out_bias": False,
            "head_bias": True,
        },
        "Wang and Komatsuzaki 2021 (GPT-J); the released configuration",
        "6,050,882,784",
    ),
    "gpt-neox-20b": Preset(
        {**_neox(44, 6144, 64, vocab_size=50432), "activation": "gelu_tanh"},
        "Black et al. 2022 (GPT-NeoX-20B), section 2.1",
        "20,554,567,680",
    ),
    "pythia-70m": _pythia(6, 512, 8, "70,426,624"),
    "pythia-160m": _pythia(12, 768, 12, "162,322,944"),
    "pythia-410m": _pythia(24, 1024, 16, "405,334,016"),
    "pythia-1b": _pythia(16, 2048, 8, "1,011,781,632"),
    "pythia-1.4b": _pythia(24, 2048, 16, "1,414,647,808"),
    "pythia-2.8b": _pythia(32, 2560, 32, "2,775,208,960"),
    "pythia-6.9b": _pythia(32, 4096, 32, "6,857,302,016", vocab_size=50432),
    "pythia-12b": _pythia(36, 5120, 40, "11,846,072,320", vocab_size=50688),
    "falcon-rw-1b": Preset(
        gpt(24, 2048, 32, vocab_size=50304, position="alibi", alibi_scale=64**-0.5, activation="gelu"),
        "Penedo et al. 2023 (RefinedWeb); the released configuration",
        "1,311,625,216",
    ),
    "falcon-7b": _falcon(32, 71, 1, "parallel_one_norm", "7,217,189,760"),
    "falcon-40b": _falcon(60, 128, 8, "parallel", "41,835,970,560"),
    "falcon-180b": _falcon(80, 232, 8, "parallel", "179,522,565,120"),
}
