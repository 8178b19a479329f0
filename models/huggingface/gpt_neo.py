"""GPT-Neo (Black et al. 2021): GPT-3's alternating dense and banded attention, with scores that are not scaled."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import one_of
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, row
from trimaran.models.huggingface.options import (
    ACTIVATIONS,
    TIED,
    Option,
    Values,
    choice,
    fixed,
    harmless,
    shortest_pattern,
    shown,
    unsupported,
    value,
)

_KINDS: Final = {"global": "full", "local": "window"}


def _read_windows(hf: Mapping[str, Any]) -> Values:
    """Read `attention_types`, a list of [kinds, times]: [[["global", "local"], 12]] alternates over 24 layers."""
    pairs = hf["attention_types"] or [[["global", "local"], 12]]
    try:
        num_layers = sum(len(kinds) * int(times) for kinds, times in pairs)
    except (TypeError, ValueError):
        raise unsupported("attention_types", pairs, "a list of [kinds, times]") from None
    if num_layers != hf["num_layers"]:
        raise ValueError(f"attention_types names {num_layers} layers, and num_layers is {hf['num_layers']}")
    words = [word for kinds, times in pairs for word in kinds * times]
    for word in words:
        if word not in _KINDS:
            raise unsupported("attention_types", word, one_of(shown(known) for known in _KINDS))
    if "local" not in words:
        return {}
    return {
        "attention_window": hf["window_size"],
        "attention_pattern": shortest_pattern([_KINDS[word] for word in words]),
    }


def _write_windows(config: TransformerConfig) -> Values:
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    words = ["global" if window is None else "local" for window in windows]
    return {
        "attention_types": [[words, 1]],
        "attention_layers": words,
        "window_size": next((w for w in windows if w is not None), 256),
    }


GPT_NEO: Final = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    architecture="GPTNeoForCausalLM",
    defaults={
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "attention_types": None,
        "num_heads": 16,
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    options=(
        fixed(
            position="learned",
            norm="layernorm",
            norm_bias=True,
            qkv_bias=False,
            out_bias=True,
            mlp_bias=True,
            attention_scale=1.0,
        ),
        value("vocab_size", "vocab_size"),
        value("max_seq_len", "max_position_embeddings"),
        value("hidden_size", "hidden_size"),
        value("num_layers", "num_layers"),
        value("num_heads", "num_heads"),
        value("ffn_hidden_size", "intermediate_size"),
        Option(("attention_types", "window_size"), _read_windows, _write_windows),
        choice("activation", "activation_function", ACTIVATIONS),
        value("norm_eps", "layer_norm_epsilon"),
        value("hidden_dropout", "resid_dropout"),
        value("embedding_dropout", "embed_dropout"),
        value("attention_dropout", "attention_dropout"),
        TIED,
        harmless("classifier_dropout", "attention_layers"),
    ),
    weights=(
        row("embedding.weight", "transformer.wte.weight"),
        row("position", "transformer.wpe.weight"),
        row("layers.{i}.attention_norm.{p}", "transformer.h.{i}.ln_1.{p}"),
        row(f"{ATTENTION}.q.weight", "transformer.h.{i}.attn.attention.q_proj.weight"),
        row(
            f"{ATTENTION}.kv.weight",
            "transformer.h.{i}.attn.attention.k_proj.weight",
            "transformer.h.{i}.attn.attention.v_proj.weight",
        ),
        row(f"{ATTENTION}.out.{{p}}", "transformer.h.{i}.attn.attention.out_proj.{p}"),
        row("layers.{i}.mlp_norm.{p}", "transformer.h.{i}.ln_2.{p}"),
        row("layers.{i}.mlp.up.{p}", "transformer.h.{i}.mlp.c_fc.{p}"),
        row("layers.{i}.mlp.down.{p}", "transformer.h.{i}.mlp.c_proj.{p}"),
        row("final_norm.{p}", "transformer.ln_f.{p}"),
        row("head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
    ignored=(r"\.attn\.attention\.(bias|masked_bias)$",),
)
