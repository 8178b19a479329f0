"""Published model shapes by name, as data: one file for each group of families.

GPT-3's alternating dense and banded layers are two fields on top of any preset, `attention_pattern: [full, window]` and
`attention_window: TOKENS`; they change what a layer reads and no parameter.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import one_of
from trimaran.models.presets.encoders import ENCODERS
from trimaran.models.presets.google import GOOGLE
from trimaran.models.presets.gpt_like import GPT_LIKE
from trimaran.models.presets.llama_like import LLAMA_LIKE
from trimaran.models.presets.parallel_block import PARALLEL_BLOCK
from trimaran.models.presets.record import Preset, gpt, llama

__all__ = ["CATALOG", "PRESETS", "Preset", "check_preset_name", "nearest_presets", "preset"]

_TRIAL: Final = "this project, for trials: seconds on a CPU"
CATALOG: Final[Mapping[str, Preset]] = {
    "gpt-tiny": Preset(gpt(4, 128, 4, max_seq_len=256, vocab_size=4096), _TRIAL, "1,350,400"),
    "llama-tiny": Preset(llama(4, 128, 4, 384, vocab_size=4096, max_seq_len=256), _TRIAL, "1,901,696"),
    "tfixup-tiny": Preset(
        {
            **llama(12, 128, 4, 512, vocab_size=4096, max_seq_len=256),
            "activation": "relu",
            "bias": True,
            "tie_embeddings": True,
        }
        | {"norm_position": "none", "init": "tfixup", "embedding_scale": 128**0.5},
        "this project, after Huang et al. 2020 (T-Fixup): a model without norms that needs no warmup",
        "2,897,408",
    ),
    **GPT_LIKE,
    **PARALLEL_BLOCK,
    **LLAMA_LIKE,
    **GOOGLE,
    **ENCODERS,
}
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {name: entry.shape for name, entry in CATALOG.items()}


def nearest_presets(name: str) -> list[str]:
    """Return up to six presets that begin with `name`, else the nearest one or two; none when all are far."""
    wanted = name.lower()
    begun = [known for known in PRESETS if wanted and known.startswith(wanted)]
    close = begun[:6] or difflib.get_close_matches(wanted, PRESETS, n=2, cutoff=0.85)
    return close or difflib.get_close_matches(wanted, PRESETS, n=1, cutoff=0.5)


def check_preset_name(name: str) -> str:
    """Return `name` when it is a preset.

    Raises:
        ValueError: it is not one; names the nearest preset.
    """
    if name in PRESETS:
        return name
    nearest = nearest_presets(name)
    hint = f"did you mean {one_of(nearest)}?" if nearest else f"`trimaran models` lists the {len(PRESETS)} presets"
    raise ValueError(f"unknown preset {name!r}; {hint}")


def preset(name: str) -> TransformerConfig:
    """Return the published shape called `name`.

    Raises:
        ValueError: there is no such preset; names the nearest one.
    """
    return TransformerConfig.model_validate(dict(PRESETS[check_preset_name(name)]))
