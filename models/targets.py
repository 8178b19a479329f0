"""The linear layers of a transformer block by name, for adapters. No torch."""

import difflib
from collections.abc import Collection, Sequence
from typing import Final

from trimaran.models.config import TransformerConfig

# Names that people know from elsewhere -> ours.
_OTHER_NAMES: Final = {
    "q_proj": "attention.q",
    "k_proj": "attention.kv",
    "v_proj": "attention.kv",
    "o_proj": "attention.out",
    "query_key_value": "attention",
    "c_attn": "attention",
    "qkv_proj": "attention",
    "gate_proj": "mlp.up",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "c_fc": "mlp.up",
    "all-linear": "attention, mlp",
}


def linear_names(config: TransformerConfig) -> tuple[str, ...]:
    """Return the names within a block of the linear layers that can have an adapter.

    Experts are none of them: they are products of groups of rows.
    """
    attention = ("attention.q", "attention.kv", "attention.out")
    return attention if config.num_experts else (*attention, "mlp.up", "mlp.down")


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the layers of `linear_names`, of each of those that are stacked."""
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "attention.q": (hidden, queries),
        "attention.kv": (hidden, keys),
        "attention.out": (queries, hidden),
        "mlp.up": (hidden, inner),
        "mlp.down": (inner, hidden),
    }
    return {name: shapes[name] for name in linear_names(config)}


def num_adapter_rows(targets: Collection[str], config: TransformerConfig) -> int:
    """Return the parameters that adapters of rank 1 beside `targets` have, in all layers."""
    shapes = linear_shapes(config)
    parts = {"attention.kv": 2, "mlp.up": 2 if config.is_gated else 1}
    rows = [parts.get(name, 1) * sum(shapes[name]) for name in shapes if is_target(name, targets)]
    return config.num_layers * sum(rows)


def is_target(name: str, targets: Collection[str]) -> bool:
    """Whether the layer `name`, such as attention.q, is one of `targets` or within one."""
    return any(name == target or name.startswith(f"{target}.") for target in targets)


def unmatched(targets: Sequence[str], config: TransformerConfig) -> list[tuple[int, str, str]]:
    """Return (index, target, what would do) of the targets that match no layer of the model."""
    names = linear_names(config)
    return [
        (index, target, _nearest(target, names))
        for index, target in enumerate(targets)
        if not any(is_target(name, [target]) for name in names)
    ]


def _nearest(target: str, names: Sequence[str]) -> str:
    """Return the names nearest to `target`, as a list."""
    known = [*dict.fromkeys(name.split(".")[0] for name in names), *names]
    other = _OTHER_NAMES.get(target.rsplit(".", 1)[-1])
    if other is not None and all(each in known for each in other.split(", ")):
        return other
    return ", ".join(difflib.get_close_matches(target, known, n=2, cutoff=0.5) or known)
