"""The standard deviation of a weight's initial values, and its learning-rate factor, by its role in the network.

Every kind draws from a normal distribution of mean 0. `h` is hidden_size, `N` num_layers. The fans of a matrix are
those of the uncut matrix, and of one matrix where several are stacked (keys and values; gate and up).

    normal        init_std for all
    depth_scaled  init_std; output projections init_std / sqrt(2 N), as the residual stream sums 2 N of them
                  (Radford et al. 2019, section 2.3)
    small_init    sqrt(2 / (5 h)) (Nguyen and Salazar 2019, section 2.2); output projections 2 / (N sqrt(h))
                  (Wang and Komatsuzaki 2021), as in GPT-NeoX-20B (Black et al. 2022, section 2.1.3)
    xavier        sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 16, as a normal);
                  embeddings h ** -0.5 (Vaswani et al. 2017)
    fan_in        fan_in ** -0.5; embeddings 1 (Chowdhery et al. 2022, section 5)
    tfixup        xavier, times 0.67 N ** -0.25 for values, output projections and the feed-forward;
                  embeddings h ** -0.5 (9 N) ** -0.25 (Huang et al. 2020, section 4.2, the encoder's rule: see below)
    deepnorm      xavier, times (8 N) ** -0.25 for values, output projections and the feed-forward
                  (Wang et al. 2022, table 1, decoder-only)
    mup           init_std for embeddings and head; init_std / sqrt(m) for the matrices between, with learning rate
                  lr / m, m = h / mup_base_width (Yang et al. 2022, table 8)

T-Fixup bounds the first update of a stack by keeping the sum of |v|^2 |w|^2 + |v|^2 |x|^2 + |w|^2 |x|^2 over its
branches near 1, where v and w are the scales of a branch's two matrices and x that of the embeddings. The paper's
decoder has 3 N branches, hence (9 N) ** -0.25 for all three. Its encoder has 2 N and uses the decoder's x, which leaves
0.67 N ** -0.25 for v and w. A decoder-only model has 2 N branches too. tfixup, deepnorm and xavier expect embeddings
multiplied by the root of h, as in Vaswani et al.: set embedding_scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import InitSpec
from trimaran.models.shape.choices import Initialization

Role = Literal[
    "embedding",
    "position",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp_input",
    "mlp_output",
    "router",
    "head_transform",
    "head",
]
_TABLES: Final = ("embedding", "position")
_OUTPUTS: Final = ("attention_output", "mlp_output")
_RESCALED: Final = ("value", "attention_output", "mlp_input", "mlp_output")  # scaled down by T-Fixup and DeepNorm


def init_spec(config: TransformerConfig, *roles: Role) -> InitSpec:
    """Return the InitSpec of a weight; several roles for several matrices stacked in it."""
    stds = tuple(_RULES[config.init](config, role) for role in roles)
    vector_like = roles[0] in (*_TABLES, "head")
    lr_scale = 1.0 if vector_like else 1.0 / config.mup_width_factor
    return InitSpec(stds[0] if len(set(stds)) == 1 else stds, lr_scale)


def fans(config: TransformerConfig, role: Role) -> tuple[int, int]:
    """Return (inputs, outputs) of a role's uncut matrix; for a table (rows, width)."""
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[Role, tuple[int, int]] = {
        "embedding": (config.vocab_size, hidden),
        "position": (config.max_seq_len, hidden),
        "query": (hidden, queries),
        "key": (hidden, keys),
        "value": (hidden, keys),
        "attention_output": (queries, hidden),
        "mlp_input": (hidden, config.ffn_hidden_size),
        "mlp_output": (config.ffn_hidden_size, hidden),
        "router": (hidden, config.num_experts),
        "head_transform": (hidden, hidden),
        "head": (hidden, config.vocab_size),
    }
    return shapes[role]


def _fourth_root(x: float) -> float:
    return math.sqrt(math.sqrt(x))


def _normal(config: TransformerConfig, role: Role) -> float:
    return config.init_std


def _depth_scaled(config: TransformerConfig, role: Role) -> float:
    return config.init_std / math.sqrt(2 * config.num_layers) if role in _OUTPUTS else config.init_std


def _small_init(config: TransformerConfig, role: Role) -> float:
    if role in _OUTPUTS:
        return 2 / (config.num_layers * math.sqrt(config.hidden_size))
    return math.sqrt(2 / (5 * config.hidden_size))


def _xavier(config: TransformerConfig, role: Role) -> float:
    # A table's rows are looked up, not summed, so its fan-in does not matter for the size of the output.
    return 1 / math.sqrt(config.hidden_size) if role in _TABLES else math.sqrt(2 / sum(fans(config, role)))


def _fan_in(config: TransformerConfig, role: Role) -> float:
    return 1.0 if role in _TABLES else 1 / math.sqrt(fans(config, role)[0])


def _tfixup(config: TransformerConfig, role: Role) -> float:
    if role in _TABLES:
        return _xavier(config, role) / _fourth_root(9 * config.num_layers)
    return _xavier(config, role) * (0.67 * _fourth_root(1 / config.num_layers) if role in _RESCALED else 1.0)


def _deepnorm(config: TransformerConfig, role: Role) -> float:
    return _xavier(config, role) / (_fourth_root(8 * config.num_layers) if role in _RESCALED else 1.0)


def _mup(config: TransformerConfig, role: Role) -> float:
    # The head's deviation would shrink with the width too; logits_scale does that instead, for tied embeddings.
    return config.init_std if role in (*_TABLES, "head") else config.init_std / math.sqrt(config.mup_width_factor)


_RULES: Final[Mapping[Initialization, Callable[[TransformerConfig, Role], float]]] = {
    "normal": _normal,
    "depth_scaled": _depth_scaled,
    "small_init": _small_init,
    "xavier": _xavier,
    "fan_in": _fan_in,
    "tfixup": _tfixup,
    "deepnorm": _deepnorm,
    "mup": _mup,
}
