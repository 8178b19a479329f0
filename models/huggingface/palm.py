"""PaLM (Chowdhery et al. 2022): parallel blocks with one LayerNorm without bias, SwiGLU, one key-value head, tied head.

Transformers has no PaLM. Cohere's Command R is the same network with any number of key-value heads, a factor of the
logits and interleaved rotary pairs. A PaLM trained here with `rotary_interleaved` is exported in that format.
"""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, llama_rows, row
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

PALM: Final = Family(
    name="palm",
    model_types=("cohere",),
    architecture="CohereForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "logit_scale": 0.0625,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 500000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=False),
        rotary(),
        fixed(rotary_interleaved=True, block="parallel_one_norm", norm="layernorm", norm_bias=False),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "layer_norm_eps"),
        value("logits_scale", "logit_scale"),
        flag("attention_bias", "qkv_bias", "out_bias"),
        value("attention_dropout", "attention_dropout"),
        only("use_qk_norm", False),
        TIED,
    ),
    weights=(
        *llama_rows(),
        row("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
        *GATED_MLP,
    ),
)
