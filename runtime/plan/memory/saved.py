"""Bytes that one layer of this runtime keeps of a microbatch from its forward to its backward pass. No torch.

    what tp does not cut     each norm: its input (the stream), its output, float32 statistics
    what tp cuts             queries; keys and values as projected; rotated keys; attention's output and float32
                             log-sum-exp; the feed-forward layer's inner outputs, and those of its activation function

A fused kernel of attention is taken, as both backends have. Under `recompute: selective` outputs of norms and of
activation functions are not kept; under `full` the input and the residual not added yet alone are. Of a LLaMA layer
without grouped queries that makes (9 h + 3 f) numbers a token, and statistics.
"""

from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.runtime.spec import RunSpec

_ROUTING_BYTES: Final = 42  # of a row of an expert: its number, weight and place
_ITEM: Final = {"bfloat16": 2, "float32": 4, "float64": 8}


def can_count(config: TransformerConfig) -> bool:
    """Whether the table has this kind of layer: no experts, dropout, relative positions or norms of queries."""
    return (
        not config.num_experts
        and not config.hidden_dropout
        and not config.attention_dropout
        and config.position != "relative"
        and config.query_key_norm == "none"
        and config.norm_position in ("pre", "post", "branch", "sandwich")
        and config.head_dim % 8 == 0
    )


def layer_bytes(spec: RunSpec, *, recomputed: bool, selective: bool) -> int:
    """Return the bytes of one layer and microbatch on a rank; an estimate where `can_count` is false.

    Args:
        recomputed: whether this layer's forward runs again.
        selective: whether what is cheap is computed again.
    """
    config, tp = spec.transformer, spec.parallel.tp
    item = _ITEM[spec.precision.dtype]
    statistic = max(4, item)
    rows = spec.train.micro_batch_size * spec.train.seq_len
    local = rows // (tp if spec.parallel.sequence_parallel else 1)
    hidden = config.hidden_size
    if recomputed:
        return 2 * local * hidden * item
    norms = config.norms_per_layer
    # Two norms of one stream keep it once; without norms the two branches' input is kept all the same.
    streams = 2 if config.norm_position == "none" else norms - 1 if config.block == "parallel" else norms
    outputs = norms - 2 if config.norm_position == "sandwich" else norms  # what is only added is not kept
    of_row = (streams + (0 if selective else outputs)) * hidden * item
    of_row += norms * statistic * (2 if config.norm == "layernorm" else 1)
    queries = config.heads_per_rank(tp)
    keys = config.kv_heads_per_rank(tp) if config.cuts_kv_heads(tp) else config.num_kv_heads
    heads = (2 * queries + 2 * keys + (keys if config.position == "rotary" else 0)) * config.head_dim * item
    if config.query_key_norm != "none":
        heads += (queries + keys) * (config.head_dim * item + statistic)
    return local * of_row + rows * (heads + queries * statistic + _feed_forward(spec, selective=selective))


def _feed_forward(spec: RunSpec, *, selective: bool) -> int:
    """Return the bytes of a token: inner outputs, the activation function's; of every row that goes to an expert."""
    config, item = spec.transformer, _ITEM[spec.precision.dtype]
    inner = -(-config.ffn_hidden_size // spec.parallel.tp) * item
    own = ((2 if config.is_gated else 1) + (0 if selective else 1)) * inner
    if not config.num_experts:
        return own
    row = own + 2 * config.hidden_size * item + _ROUTING_BYTES
    return config.experts_per_token * row + 4 * config.num_experts


def stage_bytes(spec: RunSpec, layers: range) -> int:
    """Return the bytes of a microbatch in these layers, with the stage's output."""
    every, selective = spec.train.recompute_every, spec.train.recompute == "selective"
    again = sum(i % every == 0 for i in layers) if every else 0
    kept = again * layer_bytes(spec, recomputed=True, selective=selective) if again else 0
    if len(layers) > again:
        kept += (len(layers) - again) * layer_bytes(spec, recomputed=False, selective=selective)
    rows = spec.train.micro_batch_size * spec.train.seq_len
    local = rows // (spec.parallel.tp if spec.parallel.sequence_parallel else 1)
    return kept + local * spec.transformer.hidden_size * _ITEM[spec.precision.dtype]
