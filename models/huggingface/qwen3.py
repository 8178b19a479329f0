"""Qwen 3 (Yang et al. 2025): Qwen 2's blocks with norms over each head's queries and keys instead of biases."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, GATED_MLP, PRE_NORMS, llama_rows, row
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    choice,
    fixed,
    flag,
    layer_windows,
    value,
)
from trimaran.models.huggingface.rotary import rotary

QWEN3: Final = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
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
        value("head_dim", "head_dim"),
        rotary(),
        fixed(norm="rmsnorm", query_key_norm="head"),
        layer_windows(
            lambda layer, hf: "sliding_attention" if layer >= hf["max_window_layers"] else "full_attention", switch=True
        ),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        flag("attention_bias", "qkv_bias", "out_bias"),
        value("attention_dropout", "attention_dropout"),
        TIED,
    ),
    weights=(
        *llama_rows(),
        row(f"{ATTENTION}.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
        row(f"{ATTENTION}.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
        *PRE_NORMS,
        *GATED_MLP,
    ),
)
