"""Falcon (Almazrouei et al. 2023), with its four architectures.

7B: one key-value head, parallel blocks, one norm. 40B and 180B: grouped heads, two norms. 11B: grouped heads, one norm.
RW: ALiBi.
"""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, FUSED_QKV_BY_GROUP, QKV, row
from trimaran.models.huggingface.options import (
    ACTIVATIONS,
    TIED,
    Option,
    Values,
    choice,
    fixed,
    flag,
    shown,
    unsupported,
    value,
)
from trimaran.models.huggingface.rotary import rotary


def _read_architecture(hf: Mapping[str, Any]) -> Values:
    """Return kind of block and key-value heads.

    The old decoder has one key-value head or num_attention_heads, and ignores num_kv_heads.
    """
    norms, heads = hf["num_ln_in_parallel_attn"], hf["num_attention_heads"]
    if hf["new_decoder_architecture"]:
        if not hf["parallel_attn"]:
            raise ValueError(
                "new_decoder_architecture true with parallel_attn false is not supported, nor by transformers"
            )
        if norms not in (None, 1, 2):
            raise unsupported("num_ln_in_parallel_attn", norms, "1 or 2")
        return {"block": "parallel_one_norm" if norms == 1 else "parallel", "num_kv_heads": hf["num_kv_heads"] or heads}
    if hf["parallel_attn"] and norms == 2:
        raise ValueError(
            "num_ln_in_parallel_attn 2 with new_decoder_architecture false is not supported, nor by transformers"
        )
    if not hf["multi_query"] and hf["num_kv_heads"] not in (None, heads):
        raise ValueError(
            f"num_kv_heads {shown(hf['num_kv_heads'])} with new_decoder_architecture and multi_query false "
            "is not supported, nor by transformers"
        )
    return {
        "block": "parallel_one_norm" if hf["parallel_attn"] else "sequential",
        "num_kv_heads": 1 if hf["multi_query"] else heads,
    }


def _write_architecture(config: TransformerConfig) -> Values:
    is_old = config.block == "sequential" or (
        config.block == "parallel_one_norm" and config.num_kv_heads in (1, config.num_heads)
    )
    return {
        "new_decoder_architecture": not is_old,
        "num_ln_in_parallel_attn": None if is_old else (2 if config.block == "parallel" else 1),
        "parallel_attn": config.block != "sequential",
        "multi_query": config.num_kv_heads == 1,
        "num_kv_heads": config.num_kv_heads,
    }


def _read_alibi(hf: Mapping[str, Any]) -> Values:
    if not hf["alibi"]:
        return {}
    # Others scale the scores and then add the ALiBi bias; Falcon scales the sum of both.
    return {"position": "alibi", "alibi_scale": (hf["hidden_size"] // hf["num_attention_heads"]) ** -0.5}


FALCON: Final = Family(
    name="falcon",
    model_types=("falcon",),
    architecture="FalconForCausalLM",
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_ln_in_parallel_attn": None,
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "num_kv_heads": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    },
    aliases={"n_embed": "hidden_size"},
    options=(
        fixed(norm="layernorm", norm_bias=True),
        value("vocab_size", "vocab_size"),
        value("hidden_size", "hidden_size"),
        value("num_layers", "num_hidden_layers"),
        value("num_heads", "num_attention_heads"),
        value("max_seq_len", "max_position_embeddings"),
        value("ffn_hidden_size", "ffn_hidden_size"),
        Option(
            ("new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn", "multi_query", "num_kv_heads"),
            _read_architecture,
            _write_architecture,
        ),
        Option(("alibi",), _read_alibi, lambda config: {"alibi": config.position == "alibi"}),
        rotary(unless="alibi"),
        flag("bias", "qkv_bias", "out_bias", "mlp_bias"),
        choice("activation", "activation", ACTIVATIONS),
        value("norm_eps", "layer_norm_epsilon"),
        value("hidden_dropout", "hidden_dropout"),
        value("attention_dropout", "attention_dropout"),
        TIED,
    ),
    weights=(
        row("embedding.weight", "transformer.word_embeddings.weight"),
        row("layers.{i}.attention_norm.{p}", "transformer.h.{i}.ln_attn.{p}", blocks=("parallel",)),
        row(
            "layers.{i}.attention_norm.{p}",
            "transformer.h.{i}.input_layernorm.{p}",
            blocks=("parallel_one_norm", "sequential"),
        ),
        row(QKV, "transformer.h.{i}.self_attention.query_key_value.{p}", form=FUSED_QKV_BY_GROUP),
        row(f"{ATTENTION}.out.{{p}}", "transformer.h.{i}.self_attention.dense.{p}"),
        row("layers.{i}.mlp_norm.{p}", "transformer.h.{i}.ln_mlp.{p}", blocks=("parallel",)),
        row("layers.{i}.mlp_norm.{p}", "transformer.h.{i}.post_attention_layernorm.{p}", blocks=("sequential",)),
        row("layers.{i}.mlp.up.{p}", "transformer.h.{i}.mlp.dense_h_to_4h.{p}"),
        row("layers.{i}.mlp.down.{p}", "transformer.h.{i}.mlp.dense_4h_to_h.{p}"),
        row("final_norm.{p}", "transformer.ln_f.{p}"),
        row("head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
)
