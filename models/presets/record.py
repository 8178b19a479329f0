"""Preset: a published shape, its source and its printed parameter count. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published shape.

    Args:
        shape: values of TransformerConfig; dropout is 0, for a preset is a shape and regularization belongs to the run.
        source: paper and table, or whose released files.
        published: the parameter count as printed: "124,439,808" of released weights, else with the digits of the paper,
            "6.74B" or "356M".
        besides: parameters that the published count has and this shape has not (negative: the other way round),
            named in `note`.
        note: what differs from the published model, where anything does.
    """

    shape: Mapping[str, Any]
    source: str
    published: str
    besides: int = 0
    note: str = ""


def gpt(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """Return the shape of a GPT-2 of this size (Radford et al. 2019, section 2.3), with `changes`."""
    shape = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "vocab_size": 50257,
        "max_seq_len": 2048,
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    }
    return {**shape, **changes}


def llama(num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, **changes: Any) -> dict[str, Any]:
    """Return the shape of a LLaMA of this size (Touvron et al. 2023, section 2.2), with `changes`."""
    shape = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "ffn_hidden_size": ffn_hidden_size,
        "vocab_size": 32000,
        "max_seq_len": 2048,
        "position": "rotary",
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }
    return {**shape, **changes}
