"""BLOOM (BigScience 2022): ALiBi, a norm after the embeddings, queries, keys and values fused by head."""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, FUSED_QKV_BY_GROUP, QKV, row
from trimaran.models.huggingface.options import TIED, fixed, harmless, only, value

BLOOM: Final = Family(
    name="bloom",
    model_types=("bloom",),
    architecture="BloomForCausalLM",
    defaults={
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "seq_length": 2048,  # of the published models; transformers has no bound
    },
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    options=(
        fixed(position="alibi", norm="layernorm", bias=True, embedding_norm=True, activation="gelu_tanh"),
        value("vocab_size", "vocab_size"),
        value("hidden_size", "hidden_size"),
        value("num_layers", "n_layer"),
        value("num_heads", "n_head"),
        value("max_seq_len", "seq_length"),
        value("norm_eps", "layer_norm_epsilon"),
        value("hidden_dropout", "hidden_dropout"),
        value("attention_dropout", "attention_dropout"),
        only("apply_residual_connection_post_layernorm", False),
        TIED,
        harmless("pretraining_tp", "slow_but_exact"),
    ),
    weights=(
        row("embedding.weight", "transformer.word_embeddings.weight"),
        row("embedding_norm.{p}", "transformer.word_embeddings_layernorm.{p}"),
        row("layers.{i}.attention_norm.{p}", "transformer.h.{i}.input_layernorm.{p}"),
        row(QKV, "transformer.h.{i}.self_attention.query_key_value.{p}", form=FUSED_QKV_BY_GROUP),
        row(f"{ATTENTION}.out.{{p}}", "transformer.h.{i}.self_attention.dense.{p}"),
        row("layers.{i}.mlp_norm.{p}", "transformer.h.{i}.post_attention_layernorm.{p}"),
        row("layers.{i}.mlp.up.{p}", "transformer.h.{i}.mlp.dense_h_to_4h.{p}"),
        row("layers.{i}.mlp.down.{p}", "transformer.h.{i}.mlp.dense_4h_to_h.{p}"),
        row("final_norm.{p}", "transformer.ln_f.{p}"),
        row("head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
)
