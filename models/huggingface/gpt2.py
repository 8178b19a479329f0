"""GPT-2 (Radford et al. 2019), and GPT-3 models without banded attention (Brown et al. 2020)."""

import math
from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, FUSED_QKV_TRANSPOSED, QKV, TRANSPOSED, row
from trimaran.models.huggingface.options import (
    ACTIVATIONS,
    TIED,
    Option,
    Values,
    choice,
    fixed,
    harmless,
    only,
    shown,
    value,
)


def _read_scale(hf: Mapping[str, Any]) -> Values:
    return {"attention_scale": None if hf["scale_attn_weights"] else 1.0}


def _write_scale(config: TransformerConfig) -> Values:
    usual = config.head_dim**-0.5
    scale = usual if config.attention_scale is None else config.attention_scale
    for is_scaled, known in ((True, usual), (False, 1.0)):
        if math.isclose(scale, known):
            return {"scale_attn_weights": is_scaled}
    raise ValueError(
        f"scale_attn_weights has no word for attention_scale {shown(scale)}; it knows {shown(usual)} and 1.0"
    )


GPT2: Final = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    options=(
        fixed(position="learned", norm="layernorm", bias=True),
        value("vocab_size", "vocab_size"),
        value("max_seq_len", "n_positions"),
        value("hidden_size", "n_embd"),
        value("num_layers", "n_layer"),
        value("num_heads", "n_head"),
        value("ffn_hidden_size", "n_inner"),
        choice("activation", "activation_function", ACTIVATIONS),
        value("norm_eps", "layer_norm_epsilon"),
        value("hidden_dropout", "resid_pdrop"),
        value("embedding_dropout", "embd_pdrop"),
        value("attention_dropout", "attn_pdrop"),
        Option(("scale_attn_weights",), _read_scale, _write_scale),
        only("scale_attn_by_inverse_layer_idx", False),
        TIED,
        harmless("reorder_and_upcast_attn"),
        harmless(
            "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"
        ),
    ),
    weights=(
        row("embedding.weight", "transformer.wte.weight"),
        row("position", "transformer.wpe.weight"),
        row("layers.{i}.attention_norm.{p}", "transformer.h.{i}.ln_1.{p}"),
        row(QKV, "transformer.h.{i}.attn.c_attn.{p}", form=FUSED_QKV_TRANSPOSED),
        row(f"{ATTENTION}.out.{{p}}", "transformer.h.{i}.attn.c_proj.{p}", form=TRANSPOSED),
        row("layers.{i}.mlp_norm.{p}", "transformer.h.{i}.ln_2.{p}"),
        row("layers.{i}.mlp.up.{p}", "transformer.h.{i}.mlp.c_fc.{p}", form=TRANSPOSED),
        row("layers.{i}.mlp.down.{p}", "transformer.h.{i}.mlp.c_proj.{p}", form=TRANSPOSED),
        row("final_norm.{p}", "transformer.ln_f.{p}"),
        row("head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)
