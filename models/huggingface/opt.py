"""OPT (Zhang et al. 2022): GPT-3's shape with ReLU; position 0 is the third row of its table."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, TWO_ROWS_FEWER, row
from trimaran.models.huggingface.options import (
    ACTIVATIONS,
    TIED,
    Option,
    Values,
    choice,
    fixed,
    flag,
    harmless,
    only,
    shown,
    value,
)


def _check_width(hf: Mapping[str, Any]) -> Values:
    width = hf["word_embed_proj_dim"]
    if width not in (None, hf["hidden_size"]):
        raise ValueError(
            f"word_embed_proj_dim {shown(width)} is not supported; "
            f"this runtime has embeddings of hidden_size ({hf['hidden_size']})"
        )
    return {}


OPT: Final = Family(
    name="opt",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": None,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    options=(
        fixed(position="learned", norm="layernorm", norm_eps=1e-5),
        value("vocab_size", "vocab_size"),
        value("hidden_size", "hidden_size"),
        value("num_layers", "num_hidden_layers"),
        value("num_heads", "num_attention_heads"),
        value("ffn_hidden_size", "ffn_dim"),
        value("max_seq_len", "max_position_embeddings"),
        choice("norm_position", "do_layer_norm_before", {True: "pre", False: "post"}),
        choice("activation", "activation_function", ACTIVATIONS),
        flag("enable_bias", "qkv_bias", "out_bias", "mlp_bias"),
        flag("layer_norm_elementwise_affine", "norm_weight", "norm_bias"),
        value("hidden_dropout", "dropout"),
        value("attention_dropout", "attention_dropout"),
        Option(("word_embed_proj_dim",), _check_width, lambda config: {"word_embed_proj_dim": config.hidden_size}),
        only("_remove_final_layer_norm", False),
        only("layerdrop", 0.0),
        TIED,
        harmless("init_std"),
    ),
    weights=(
        row("embedding.weight", "model.decoder.embed_tokens.weight"),
        row("position", "model.decoder.embed_positions.weight", form=TWO_ROWS_FEWER),
        # The same names for pre-norm and post-norm.
        row("layers.{i}.attention_norm.{p}", "model.decoder.layers.{i}.self_attn_layer_norm.{p}"),
        row("layers.{i}.attention_post_norm.{p}", "model.decoder.layers.{i}.self_attn_layer_norm.{p}"),
        row("layers.{i}.mlp_norm.{p}", "model.decoder.layers.{i}.final_layer_norm.{p}"),
        row("layers.{i}.mlp_post_norm.{p}", "model.decoder.layers.{i}.final_layer_norm.{p}"),
        row(f"{ATTENTION}.q.{{p}}", "model.decoder.layers.{i}.self_attn.q_proj.{p}"),
        row(
            f"{ATTENTION}.kv.{{p}}",
            "model.decoder.layers.{i}.self_attn.k_proj.{p}",
            "model.decoder.layers.{i}.self_attn.v_proj.{p}",
        ),
        row(f"{ATTENTION}.out.{{p}}", "model.decoder.layers.{i}.self_attn.out_proj.{p}"),
        row("layers.{i}.mlp.up.{p}", "model.decoder.layers.{i}.fc1.{p}"),
        row("layers.{i}.mlp.down.{p}", "model.decoder.layers.{i}.fc2.{p}"),
        row("final_norm.{p}", "model.decoder.final_layer_norm.{p}"),
        row("head.weight", "lm_head.weight"),
    ),
)
