"""Conversions between the tensors of a Hugging Face file and ours: named forms, and the rows of a weight map.

A row maps tensors of a file to ours, with {i} for the layer, {p} for weight or bias, and {e} for the expert. A form
converts in both directions. It is exact, but PLUS_ONE rounds, and of OPT's positions and XLNet's attention parts are
lost that the network never reads; `runtime/huggingface/originals.py` keeps what is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig

Turn = Callable[[Sequence[Tensor], TransformerConfig], list[Tensor]]


@dataclass(frozen=True)
class Form:
    """A conversion of a file's tensors to ours and its inverse; on global tensors; results may share their memory.

    Args:
        is_exact: whether the way there and back changes no bit.
        lost: what ours have no place for, so that `to_theirs` writes zeros.
    """

    name: str
    to_ours: Turn
    to_theirs: Turn
    is_exact: bool = True
    lost: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a weight map, for every layer at once.

    Args:
        ours, theirs: names with {i}, {p} and (theirs) {e}; a name with {e} expands to one for each expert, in order.
        blocks: kinds of block to which the row applies; empty for all.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form
    blocks: tuple[str, ...] = ()


def _same(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return list(tensors)


def _transposed(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensor.t() for tensor in tensors]


def _stack(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [torch.stack(tuple(tensors))]


def _unstack(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return list(tensors[0].unbind(0))


def _split_fused(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v = tensors[0].split((queries, keys, keys))
    return [q, torch.stack((k, v))]


def _fuse(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    q, kv = tensors
    return [torch.cat((q, *kv.unbind(0)))]


def _split_fused_groups(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    groups = tensors[0].unflatten(
        0, (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
    )
    return [groups[:, :-2].flatten(0, 2), torch.stack([groups[:, at].flatten(0, 1) for at in (-2, -1)])]


def _fuse_groups(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    q, kv = tensors
    queries = q.unflatten(0, (config.num_kv_heads, -1, config.head_dim))
    keys_values = kv.unflatten(1, (config.num_kv_heads, config.head_dim)).transpose(0, 1)
    return [torch.cat((queries, keys_values), dim=1).flatten(0, 2)]


def _add_one(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    # In half precision 1 + w would lose w, which is small.
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + 1 for tensor in tensors]


def _take_one(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) - 1 for tensor in tensors]


_OPT_OFFSET: Final = 2


def _drop_rows(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [tensors[0][_OPT_OFFSET:]]


def _add_rows(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    table = tensors[0]
    return [torch.cat((table.new_zeros(_OPT_OFFSET, table.shape[1]), table))]


def _stack_gated_experts(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    half = len(tensors) // 2
    return [torch.stack([torch.stack(pair) for pair in zip(tensors[:half], tensors[half:], strict=True)])]


def _unstack_gated_experts(tensors: Sequence[Tensor], config: TransformerConfig) -> list[Tensor]:
    return [expert[part] for part in (0, 1) for expert in tensors[0].unbind(0)]


def _after(first: Turn, second: Turn) -> Turn:
    return lambda tensors, config: second(first(tensors, config), config)


SAME: Final = Form("same", _same, _same)
# GPT-2's Conv1D holds [in, out]; biases do not change.
TRANSPOSED: Final = Form("transposed", _transposed, _transposed)
# Keys and values, or gate and up, or the experts: tensors of one shape become [number, ...].
STACKED: Final = Form("stacked", _stack, _unstack)
# Rows of all queries, then all keys, then all values.
FUSED_QKV: Final = Form("queries, keys, values fused", _split_fused, _fuse)
FUSED_QKV_TRANSPOSED: Final = Form(
    "queries, keys, values fused and transposed", _after(_transposed, _split_fused), _after(_fuse, _transposed)
)
# For each key-value head the rows of its query heads, its key, its value. Falcon; with one query head each GPT-NeoX and
# BLOOM; with one group multi-query attention.
FUSED_QKV_BY_GROUP: Final = Form("queries, keys, values fused by group", _split_fused_groups, _fuse_groups)
# Norms that multiply by 1 + w (Gemma); ours are float32 at least.
PLUS_ONE: Final = Form("plus one", _add_one, _take_one, is_exact=False)
# OPT's position table begins with two rows that no position reads.
TWO_ROWS_FEWER: Final = Form(
    "two rows fewer",
    _drop_rows,
    _add_rows,
    is_exact=False,
    lost="the first two rows of the table of positions, which no position reads",
)
# The gates of all experts, then the ups of all experts: [experts, 2, f, h].
GATED_EXPERTS: Final = Form("gates and ups of experts", _stack_gated_experts, _unstack_gated_experts)


def row(ours: str | tuple[str, ...], *theirs: str, form: Form | None = None, blocks: tuple[str, ...] = ()) -> Row:
    """Return a row; without a form one tensor is copied, and several of theirs are stacked into one of ours."""
    names = (ours,) if isinstance(ours, str) else ours
    return Row(names, theirs, form or (SAME if len(theirs) == 1 else STACKED), blocks)


ATTENTION: Final = "layers.{i}.attention"
QKV: Final = (f"{ATTENTION}.q.{{p}}", f"{ATTENTION}.kv.{{p}}")


def llama_rows(final_norm: Form = SAME) -> tuple[Row, ...]:
    """Return the rows of embedding, attention, final norm and head under LLaMA's names, which most families use."""
    return (
        row("embedding.weight", "model.embed_tokens.weight"),
        row(f"{ATTENTION}.q.{{p}}", "model.layers.{i}.self_attn.q_proj.{p}"),
        row(f"{ATTENTION}.kv.{{p}}", "model.layers.{i}.self_attn.k_proj.{p}", "model.layers.{i}.self_attn.v_proj.{p}"),
        row(f"{ATTENTION}.out.{{p}}", "model.layers.{i}.self_attn.o_proj.{p}"),
        row("final_norm.{p}", "model.norm.{p}", form=final_norm),
        row("head.weight", "lm_head.weight"),
    )


GATED_MLP: Final = (
    row("layers.{i}.mlp.up.{p}", "model.layers.{i}.mlp.gate_proj.{p}", "model.layers.{i}.mlp.up_proj.{p}"),
    row("layers.{i}.mlp.down.{p}", "model.layers.{i}.mlp.down_proj.{p}"),
)
PRE_NORMS: Final = (
    row("layers.{i}.attention_norm.{p}", "model.layers.{i}.input_layernorm.{p}"),
    row("layers.{i}.mlp_norm.{p}", "model.layers.{i}.post_attention_layernorm.{p}"),
)
