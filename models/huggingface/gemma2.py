"""Gemma 2 (Gemma Team 2024): sandwich norms, windows in every other layer, soft caps on scores and logits."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, PLUS_ONE, llama_rows, row
from trimaran.models.huggingface.gemma import root_of_width
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    Option,
    Values,
    choice,
    fixed,
    flag,
    layer_windows,
    only,
    value,
)
from trimaran.models.huggingface.rotary import rotary


def _read_query_scale(hf: Mapping[str, Any]) -> Values:
    return {"attention_scale": hf["query_pre_attn_scalar"] ** -0.5}


def _write_query_scale(config: TransformerConfig) -> Values:
    return {
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2)
    }  # a whole number there


GEMMA2: Final = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        value("head_dim", "head_dim"),
        rotary(),
        root_of_width(),
        fixed(norm="rmsnorm", norm_position="sandwich"),
        layer_windows(lambda layer, hf: "full_attention" if layer % 2 else "sliding_attention", switch=False),
        Option(("query_pre_attn_scalar",), _read_query_scale, _write_query_scale),
        value("attention_softcap", "attn_logit_softcapping"),
        value("logits_softcap", "final_logit_softcapping"),
        choice("activation", "hidden_activation", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        flag("attention_bias", "qkv_bias", "out_bias"),
        value("attention_dropout", "attention_dropout"),
        only("use_bidirectional_attention", False),
        TIED,
    ),
    weights=(
        *llama_rows(final_norm=PLUS_ONE),
        row("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", form=PLUS_ONE),
        row("layers.{i}.attention_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", form=PLUS_ONE),
        row("layers.{i}.mlp_norm.weight", "model.layers.{i}.pre_feedforward_layernorm.weight", form=PLUS_ONE),
        row("layers.{i}.mlp_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight", form=PLUS_ONE),
        *GATED_MLP,
    ),
)
