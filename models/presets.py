"""Published model shapes by name, as data.

Dropout is left at 0 for all of them: a preset is a shape, and regularization belongs to the run.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig, one_of


def _gpt(num_layers: int, hidden_size: int, num_heads: int, max_seq_len: int, vocab_size: int = 50257) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    }


def _llama(num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, **changes: Any) -> dict[str, Any]:
    shape = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "ffn_hidden_size": ffn_hidden_size,
        "vocab_size": 32000,
        "max_seq_len": 2048,
        "position": "rotary",
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }
    return {**shape, **changes}


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # For trials: seconds on a CPU.
    "gpt-tiny": _gpt(4, 128, 4, max_seq_len=256, vocab_size=4096),
    "llama-tiny": _llama(4, 128, 4, 384, vocab_size=4096, max_seq_len=256, norm_eps=1e-5),
    # Radford et al. 2019, table 2; the head counts are those of the released weights.
    "gpt2-124m": _gpt(12, 768, 12, max_seq_len=1024),
    "gpt2-355m": _gpt(24, 1024, 16, max_seq_len=1024),
    "gpt2-774m": _gpt(36, 1280, 20, max_seq_len=1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, max_seq_len=1024),
    # Brown et al. 2020, table 2.1. Two rows of it do not multiply out (1.3B: 24 heads of 128 at width 2048; 13B: width 5140);
    # the shapes here are the ones that give the parameter counts of its table D.1 (1,320M and 12,850M).
    # GPT-3's alternating sparse attention changes no parameter count; these presets attend densely.
    "gpt3-125m": _gpt(12, 768, 12, max_seq_len=2048),
    "gpt3-350m": _gpt(24, 1024, 16, max_seq_len=2048),
    "gpt3-760m": _gpt(24, 1536, 16, max_seq_len=2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, max_seq_len=2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, max_seq_len=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, max_seq_len=2048),
    "gpt3-13b": _gpt(40, 5120, 40, max_seq_len=2048),
    "gpt3-175b": _gpt(96, 12288, 96, max_seq_len=2048),
    # Touvron et al. 2023 (LLaMA), table 2; feed-forward widths and norm_eps from the released params files.
    "llama-7b": _llama(32, 4096, 32, 11008),
    "llama-13b": _llama(40, 5120, 40, 13824),
    "llama-30b": _llama(60, 6656, 52, 17920),
    "llama-65b": _llama(80, 8192, 64, 22016, norm_eps=1e-5),
    # Touvron et al. 2023 (LLaMA 2), table 1 and appendix A.2.1.
    "llama2-70b": _llama(80, 8192, 64, 28672, num_kv_heads=8, max_seq_len=4096, norm_eps=1e-5),
    # Grattafiori et al. 2024 (Llama 3), table 3.
    "llama3-8b": _llama(32, 4096, 32, 14336, num_kv_heads=8, vocab_size=128256, max_seq_len=8192, norm_eps=1e-5, rotary_base=500000.0),
}


def check_preset_name(name: str) -> str:
    """Return `name` when it is a preset.

    Raises:
        ValueError: it is not one; names the nearest preset.
    """
    if name in PRESETS:
        return name
    wanted = name.lower()
    # Two names when both are one slip away, as gpt2-124m and gpt3-125m are from gpt2-125m.
    close = [wanted] if wanted in PRESETS else difflib.get_close_matches(wanted, PRESETS, n=2, cutoff=0.85)
    nearest = close or difflib.get_close_matches(wanted, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {one_of(nearest)}?" if nearest else f"the presets are {', '.join(PRESETS)}"
    raise ValueError(f"unknown preset {name!r}; {hint}")


def preset(name: str) -> TransformerConfig:
    """Return the published shape called `name`.

    Raises:
        ValueError: there is no such preset; names the nearest one.
    """
    return TransformerConfig.model_validate(dict(PRESETS[check_preset_name(name)]))
