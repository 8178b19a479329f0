"""Which numbers a weight starts from, and how fast it learns, by its role in the network.

Every kind draws from a normal distribution of mean 0; what differs is the deviation. `h` is hidden_size, `N`
num_layers; the fans of a matrix are those of the whole network, whatever part of it a rank holds, and of one matrix
where several are stored together (keys and values; gate and up).

    normal        init_std for all
    depth_scaled  output projections init_std / sqrt(2 N): residual branches add up over 2 N outputs (Radford et al.
    2019, section 2.3) small_init    sqrt(2 / (5 h)) (Nguyen and Salazar 2019, section 2.2); output projections 2 / (N
                  sqrt(h)) (Wang and Komatsuzaki 2021), as in GPT-NeoX-20B (Black et al. 2022, section 2.1.3)
    xavier        sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 16, as a normal); embeddings h ** -0.5
    (Vaswani et al. 2017) fan_in        fan_in ** -0.5; embeddings 1 (Chowdhery et al. 2022, section 5)
    tfixup        xavier, times 0.67 N ** -0.25 for values, output projections and the feed-forward; embeddings h **
                  -0.5 (9 N) ** -0.25 (Huang et al. 2020, section 4.2, the encoder's rule: see below)
    deepnorm      xavier, times (8 N) ** -0.25 for values, output projections and the feed-forward (Wang et al. 2022,
    table 1, decoder-only) mup           init_std for embeddings and head, init_std / sqrt(m) for the matrices between,
                  which learn at lr / m, m = h / mup_base_width (Yang et al. 2022, table 8)

T-Fixup bounds the first update of a stack by keeping the sum of |v|^2 |w|^2 + |v|^2 |x|^2 + |w|^2 |x|^2 over its
branches near 1, v and w being the scales of a branch's two matrices and x that of the embeddings. A decoder of the
paper has 3 N branches, hence (9 N) ** -0.25 for all three. Its encoder has 2 N and takes x from there, which leaves
0.67 N ** -0.25 for v and w. A decoder-only model has 2 N branches as well. tfixup, deepnorm and xavier expect
embeddings that grow by the root of h on their way in, as in Vaswani et al.: set embedding_scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal

from trimaran.models.choices import Initialization
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import InitSpec

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
_RESCALED: Final = ("value", "attention_output", "mlp_input", "mlp_output")  # what T-Fixup and DeepNorm make smaller


def init_spec(config: TransformerConfig, *roles: Role) -> InitSpec:
    """Return how the weight of these roles starts and learns; more than one role for matrices that are stored as one weight."""
    stds = tuple(_RULES[config.init](config, role) for role in roles)
    vector_like = roles[0] in (*_TABLES, "head")
    lr_scale = 1.0 if vector_like else 1.0 / config.mup_width_factor
    return InitSpec(stds[0] if len(set(stds)) == 1 else stds, lr_scale)


def fans(config: TransformerConfig, role: Role) -> tuple[int, int]:
    """Return (inputs, outputs) of the whole matrix of a role; those of a table are its rows and its width."""
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
    # A table's rows are looked up, not summed over: its fan-in says nothing of the size of what comes out.
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
    # The head's variance would shrink by the width too; its factor logits_scale does that instead, which a tied
    # embedding needs.
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
