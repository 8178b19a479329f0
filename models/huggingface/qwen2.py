"""Qwen 2 and 2.5 (Yang et al. 2024): LLaMA's blocks with QKV biases, and optional windows in the last layers."""

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
    head_width,
    layer_windows,
    value,
)
from trimaran.models.huggingface.rotary import rotary

QWEN2: Final = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=False),
        rotary(),
        fixed(norm="rmsnorm", qkv_bias=True),
        layer_windows(
            lambda layer, hf: "sliding_attention" if layer >= hf["max_window_layers"] else "full_attention", switch=True
        ),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        value("attention_dropout", "attention_dropout"),
        TIED,
    ),
    weights=(*llama_rows(), *PRE_NORMS, *GATED_MLP),
)
