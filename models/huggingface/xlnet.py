"""XLNet (Yang et al. 2019): an encoder trained on permutations, with relative positions, post-norm.

Not supported: the memory of earlier segments, and the relative encoding of segments, which transformers uses only with
token types; import keeps its two parameters beside the run for an export. Dropout applies to embeddings, attention's
probabilities and the branches' outputs; transformers also has it inside the feed-forward layer, on the encoded
distances and before the head. config.json has no longest sequence; `seq_length` is ours.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, Form, row
from trimaran.models.huggingface.options import ACTIVATIONS, choice, fixed, harmless, only, value


def _rows_of_heads(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    """Convert [hidden, heads, head_dim] each to [heads * head_dim, hidden], stacked where there are several."""
    rows = [tensor.flatten(1).t() for tensor in tensors]
    return rows if len(rows) == 1 else [torch.stack(rows)]


def _heads_of_rows(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    rows = tensors[0].unbind(0) if tensors[0].ndim == 3 else [tensors[0]]
    return [each.t().unflatten(1, (config.num_heads, config.head_dim)) for each in rows]


def _join_heads(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensors[0].flatten(1)]


def _part_heads(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensors[0].unflatten(1, (config.num_heads, config.head_dim))]


def _drop_segments(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensor.flatten() for tensor in tensors[:2]]


def _add_segments(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    biases = [tensor.view(config.num_heads, config.head_dim) for tensor in tensors]
    return [*biases, torch.zeros_like(biases[0]), biases[0].new_zeros(2, config.num_heads, config.head_dim)]


def _flat(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensors[0].flatten()]


def _row_of_one(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensors[0].view(1, 1, -1)]


_HEADS: Final = Form("[hidden, heads, head_dim] transposed", _rows_of_heads, _heads_of_rows)
_LAYER: Final = "transformer.layer.{i}"
_BIASES: Final = ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed")

XLNET: Final = Family(
    name="xlnet",
    model_types=("xlnet",),
    architecture="XLNetLMHeadModel",
    defaults={
        "vocab_size": 32000,
        "d_model": 1024,
        "n_layer": 24,
        "n_head": 16,
        "d_inner": 4096,
        "d_head": None,
        "ff_activation": "gelu",
        "layer_norm_eps": 1e-12,
        "dropout": 0.1,
        "tie_word_embeddings": True,
        "seq_length": 512,  # of the published models' training; transformers has no bound
    },
    aliases={
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    options=(
        fixed(
            objective="permutation_lm",
            position="relative",
            norm="layernorm",
            norm_position="post",
            tie_embeddings=True,
            head_bias=True,
        ),
        fixed(bias=True, qkv_bias=False, out_bias=False),
        value("vocab_size", "vocab_size"),
        value("hidden_size", "d_model"),
        value("num_layers", "n_layer"),
        value("num_heads", "n_head"),
        value("ffn_hidden_size", "d_inner"),
        value("head_dim", "d_head"),
        value("max_seq_len", "seq_length"),
        choice("activation", "ff_activation", ACTIVATIONS),
        value("norm_eps", "layer_norm_eps"),
        value("embedding_dropout", "dropout"),
        value("hidden_dropout", "dropout"),
        value("attention_dropout", "dropout"),
        only("attn_type", "bi"),
        only("bi_data", False),
        only("clamp_len", -1, None),
        only("same_length", False),
        only("untie_r", True),
        only("tie_word_embeddings", True),
        harmless("mem_len", "reuse_len", "use_mems_eval", "use_mems_train"),
        harmless(
            "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout", "start_n_top", "end_n_top"
        ),
    ),
    weights=(
        row("embedding.weight", "transformer.word_embedding.weight"),
        row("query_embedding", "transformer.mask_emb", form=Form("a row of one", _flat, _row_of_one)),
        row(f"{ATTENTION}.q.weight", f"{_LAYER}.rel_attn.q", form=_HEADS),
        row(f"{ATTENTION}.kv.weight", f"{_LAYER}.rel_attn.k", f"{_LAYER}.rel_attn.v", form=_HEADS),
        row(f"{ATTENTION}.position", f"{_LAYER}.rel_attn.r", form=_HEADS),
        row(f"{ATTENTION}.out.weight", f"{_LAYER}.rel_attn.o", form=Form("heads joined", _join_heads, _part_heads)),
        row(
            (f"{ATTENTION}.content_bias", f"{ATTENTION}.position_bias"),
            *(f"{_LAYER}.rel_attn.{name}" for name in _BIASES),
            form=Form(
                "biases of heads, without segments",
                _drop_segments,
                _add_segments,
                is_exact=False,
                lost="r_s_bias and seg_embed, which transformers reads only with token types",
            ),
        ),
        row("layers.{i}.attention_post_norm.{p}", f"{_LAYER}.rel_attn.layer_norm.{{p}}"),
        row("layers.{i}.mlp.up.{p}", f"{_LAYER}.ff.layer_1.{{p}}"),
        row("layers.{i}.mlp.down.{p}", f"{_LAYER}.ff.layer_2.{{p}}"),
        row("layers.{i}.mlp_post_norm.{p}", f"{_LAYER}.ff.layer_norm.{{p}}"),
        row("head_bias", "lm_loss.bias"),
        row("head.weight", "lm_loss.weight"),
    ),
    prefix="transformer.",
)
