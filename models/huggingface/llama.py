"""LLaMA 1, 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), and the many models in its format."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, PRE_NORMS, llama_rows
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    choice,
    fixed,
    flag,
    harmless,
    head_width,
    value,
)
from trimaran.models.huggingface.rotary import rotary

LLAMA: Final = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=True),
        rotary(),
        fixed(norm="rmsnorm"),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        flag("attention_bias", "qkv_bias", "out_bias"),
        flag("mlp_bias", "mlp_bias"),
        value("attention_dropout", "attention_dropout"),
        TIED,
        harmless("pretraining_tp"),
    ),
    weights=(*llama_rows(), *PRE_NORMS, *GATED_MLP),
)
