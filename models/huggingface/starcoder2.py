"""StarCoder 2 (Lozhkov et al. 2024): GPT-2's LayerNorm and biases, Mistral's grouped heads, rotation and window."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import PRE_NORMS, llama_rows, row
from trimaran.models.huggingface.options import (
    ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    attention_window,
    choice,
    fixed,
    flag,
    head_width,
    value,
)
from trimaran.models.huggingface.rotary import rotary

STARCODER2: Final = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    architecture="Starcoder2ForCausalLM",
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_bias": True,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=False),
        rotary(),
        fixed(norm="layernorm", norm_bias=True),
        flag("use_bias", "qkv_bias", "out_bias", "mlp_bias"),
        attention_window(),
        choice("activation", "hidden_act", ACTIVATIONS),
        value("norm_eps", "norm_epsilon"),
        value("attention_dropout", "attention_dropout"),
        value("hidden_dropout", "residual_dropout"),
        value("embedding_dropout", "embedding_dropout"),
        TIED,
    ),
    weights=(
        *llama_rows(),
        *PRE_NORMS,
        row("layers.{i}.mlp.up.{p}", "model.layers.{i}.mlp.c_fc.{p}"),
        row("layers.{i}.mlp.down.{p}", "model.layers.{i}.mlp.c_proj.{p}"),
    ),
)
