"""GPT-NeoX-20B (Black et al. 2022) and Pythia: parallel or sequential blocks, partial rotation, QKV fused by head."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, FUSED_QKV_BY_GROUP, QKV, row
from trimaran.models.huggingface.options import ACTIVATIONS, SIZES, TIED, choice, fixed, flag, harmless, value
from trimaran.models.huggingface.rotary import rotary

GPT_NEOX: Final = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
    },
    options=(
        *SIZES,
        rotary(base="rotary_emb_base", part="rotary_pct"),
        fixed(norm="layernorm", mlp_bias=True, norm_bias=True),
        flag("attention_bias", "qkv_bias", "out_bias"),
        choice("block", "use_parallel_residual", {True: "parallel", False: "sequential"}),
        choice("activation", "hidden_act", ACTIVATIONS),
        value("norm_eps", "layer_norm_eps"),
        value("embedding_dropout", "hidden_dropout"),
        value("hidden_dropout", "hidden_dropout"),
        value("attention_dropout", "attention_dropout"),
        TIED,
        harmless("classifier_dropout", "is_decoder"),
    ),
    weights=(
        row("embedding.weight", "gpt_neox.embed_in.weight"),
        row("layers.{i}.attention_norm.{p}", "gpt_neox.layers.{i}.input_layernorm.{p}"),
        row(QKV, "gpt_neox.layers.{i}.attention.query_key_value.{p}", form=FUSED_QKV_BY_GROUP),
        row(f"{ATTENTION}.out.{{p}}", "gpt_neox.layers.{i}.attention.dense.{p}"),
        row("layers.{i}.mlp_norm.{p}", "gpt_neox.layers.{i}.post_attention_layernorm.{p}"),
        row("layers.{i}.mlp.up.{p}", "gpt_neox.layers.{i}.mlp.dense_h_to_4h.{p}"),
        row("layers.{i}.mlp.down.{p}", "gpt_neox.layers.{i}.mlp.dense_4h_to_h.{p}"),
        row("final_norm.{p}", "gpt_neox.final_layer_norm.{p}"),
        row("head.weight", "embed_out.weight"),
    ),
    prefix="gpt_neox.",
    renamed={"lm_head.": "embed_out."},
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
