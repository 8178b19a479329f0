"""Mistral 7B (Jiang et al. 2023): LLaMA's blocks with a sliding window in every layer."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, PRE_NORMS, llama_rows
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    attention_window,
    choice,
    fixed,
    head_width,
    value,
)
from trimaran.models.huggingface.rotary import rotary

MISTRAL: Final = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=True),
        rotary(),
        fixed(norm="rmsnorm"),
        attention_window(),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        value("attention_dropout", "attention_dropout"),
        TIED,
    ),
    weights=(*llama_rows(), *PRE_NORMS, *GATED_MLP),
)
