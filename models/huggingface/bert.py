"""BERT (Devlin et al. 2019): an encoder for masked tokens, post-norm, with a dense layer before the tied head.

Import, training and export cover the masked language model; the pooler and the next-sentence head of a pre-training
file are dropped. Every token has the first token type; the embeddings of the other types are kept unchanged.
"""

from typing import Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, row
from trimaran.models.huggingface.options import ACTIVATIONS, SIZES, choice, fixed, harmless, only, value

_LAYER: Final = "bert.encoder.layer.{i}"

BERT: Final = Family(
    name="bert",
    model_types=("bert",),
    architecture="BertForMaskedLM",
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "is_decoder": False,
        "tie_word_embeddings": True,
    },
    options=(
        *SIZES,
        fixed(
            objective="masked_lm",
            position="learned",
            norm="layernorm",
            norm_position="post",
            embedding_norm=True,
            bias=True,
        ),
        fixed(head_transform=True, head_bias=True, tie_embeddings=True),
        value("num_token_types", "type_vocab_size"),
        choice("activation", "hidden_act", ACTIVATIONS),
        value("norm_eps", "layer_norm_eps"),
        value("embedding_dropout", "hidden_dropout_prob"),
        value("hidden_dropout", "hidden_dropout_prob"),
        value("attention_dropout", "attention_probs_dropout_prob"),
        only("is_decoder", False),
        only("tie_word_embeddings", True),
        only("position_embedding_type", "absolute", None),
        harmless("classifier_dropout", "gradient_checkpointing"),
    ),
    weights=(
        row("embedding.weight", "bert.embeddings.word_embeddings.weight"),
        row("position", "bert.embeddings.position_embeddings.weight"),
        row("token_type", "bert.embeddings.token_type_embeddings.weight"),
        row("embedding_norm.{p}", "bert.embeddings.LayerNorm.{p}"),
        row(f"{ATTENTION}.q.{{p}}", f"{_LAYER}.attention.self.query.{{p}}"),
        row(f"{ATTENTION}.kv.{{p}}", f"{_LAYER}.attention.self.key.{{p}}", f"{_LAYER}.attention.self.value.{{p}}"),
        row(f"{ATTENTION}.out.{{p}}", f"{_LAYER}.attention.output.dense.{{p}}"),
        row("layers.{i}.attention_post_norm.{p}", f"{_LAYER}.attention.output.LayerNorm.{{p}}"),
        row("layers.{i}.mlp.up.{p}", f"{_LAYER}.intermediate.dense.{{p}}"),
        row("layers.{i}.mlp.down.{p}", f"{_LAYER}.output.dense.{{p}}"),
        row("layers.{i}.mlp_post_norm.{p}", f"{_LAYER}.output.LayerNorm.{{p}}"),
        row("head_transform.{p}", "cls.predictions.transform.dense.{p}"),
        row("head_transform_norm.{p}", "cls.predictions.transform.LayerNorm.{p}"),
        row("head_bias", "cls.predictions.bias"),
        row("head.weight", "cls.predictions.decoder.weight"),
    ),
    prefix="bert.",
    endings={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},  # of the files of 2018
    # The decoder's bias is cls.predictions.bias under a second name.
    ignored=(r"position_ids$", r"^cls\.predictions\.decoder\.bias$", r"(^|\.)pooler\.", r"^cls\.seq_relationship\."),
)
