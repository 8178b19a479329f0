"""OLMo 2 (OLMo Team 2024): norms on the output of each branch, and over all queries and all keys together."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, GATED_MLP, llama_rows, row
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    choice,
    fixed,
    flag,
    head_width,
    value,
)
from trimaran.models.huggingface.rotary import rotary

OLMO2: Final = Family(
    name="olmo2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
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
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=False),
        rotary(),
        fixed(norm="rmsnorm", norm_position="branch", query_key_norm="width"),
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
        row("layers.{i}.attention_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
        row("layers.{i}.mlp_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight"),
        *GATED_MLP,
    ),
)
