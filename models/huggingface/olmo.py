"""OLMo (Groeneveld et al. 2024): LLaMA's blocks with LayerNorm that has neither scale nor bias."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, llama_rows
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    choice,
    fixed,
    flag,
    head_width,
    only,
    value,
)
from trimaran.models.huggingface.rotary import rotary

OLMO: Final = Family(
    name="olmo",
    model_types=("olmo",),
    architecture="OlmoForCausalLM",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=False),
        rotary(),
        fixed(norm="layernorm", norm_weight=False, norm_bias=False, norm_eps=1e-5),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        flag("attention_bias", "qkv_bias", "out_bias"),
        value("attention_dropout", "attention_dropout"),
        only("clip_qkv", None),
        TIED,
    ),
    weights=(*llama_rows(), *GATED_MLP),
)
