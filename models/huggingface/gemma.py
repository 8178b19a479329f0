"""Gemma (Gemma Team 2024): LLaMA's blocks with GeGLU, wide heads, scaled embeddings, norms that multiply by 1 + w."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_MLP, PLUS_ONE, llama_rows, row
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
    only,
    value,
)
from trimaran.models.huggingface.rotary import rotary


def root_of_width() -> Option:
    """Return the option that scales the embeddings by sqrt(hidden_size), for which Gemma's config.json has no key."""

    def read(hf: Mapping[str, Any]) -> Values:
        return {"embedding_scale": hf["hidden_size"] ** 0.5}

    return Option((), read, lambda config: {})


GEMMA: Final = Family(
    name="gemma",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
    },
    options=(
        *SIZES,
        KV_HEADS,
        value("head_dim", "head_dim"),
        rotary(),
        root_of_width(),
        fixed(norm="rmsnorm"),
        # The first releases say gelu and mean its tanh form; transformers reads it so.
        choice(
            "activation", "hidden_act", {"gelu_pytorch_tanh": "geglu_tanh", **GATED_ACTIVATIONS, "gelu": "geglu_tanh"}
        ),
        only("hidden_activation", None, "gelu_pytorch_tanh"),
        value("norm_eps", "rms_norm_eps"),
        flag("attention_bias", "qkv_bias", "out_bias"),
        value("attention_dropout", "attention_dropout"),
        only("use_bidirectional_attention", False),
        TIED,
    ),
    weights=(
        *llama_rows(final_norm=PLUS_ONE),
        row("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", form=PLUS_ONE),
        row("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", form=PLUS_ONE),
        *GATED_MLP,
    ),
)
