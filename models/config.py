"""TransformerConfig: the shape of a transformer language model, checked whole and free of torch.

The record is what every other room reads: it says how big each matrix is and how the blocks are put together, never how they are cut.
Imports no torch, so that a wrong shape is refused before anything heavy is loaded.
"""

import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimaran.models.fields import (
    Count,
    Dropout,
    NonNegative,
    NonNegativeWhole,
    Positive,
)
from trimaran.models.shape_rules import SHAPE_RULES

Position = Literal["learned", "rotary", "alibi", "relative", "none"]
Norm = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post", "branch", "sandwich", "none"]
BlockKind = Literal["sequential", "parallel", "parallel_one_norm"]
Activation = Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]
QueryKeyNorm = Literal["none", "head", "width"]
AttentionKind = Literal["full", "window"]
Objective = Literal["causal_lm", "masked_lm", "permutation_lm"]
Initialization = Literal["normal", "depth_scaled", "small_init", "xavier", "fan_in", "tfixup", "deepnorm", "mup"]
GATED_ACTIVATIONS: Final = ("swiglu", "geglu", "geglu_tanh")


class RotaryScaling(BaseModel):
    """How rotary frequencies are stretched to longer contexts; the formulas stand in kernels/rotary.py under the same names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = Field(description="Which formula.")
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(description="How many times longer the context becomes.")
    original_max_position: Count | None = Field(default=None, description="dynamic_ntk, yarn, llama3: length the model was trained at.")
    low_freq_factor: Positive = Field(default=1.0, description="llama3: longer wavelengths than original length / this are interpolated.")
    high_freq_factor: Positive = Field(default=4.0, description="llama3: shorter wavelengths than original length / this stay.")
    beta_fast: Positive = Field(default=32.0, description="yarn: pairs that turn more often within the original length stay.")
    beta_slow: Positive = Field(default=1.0, description="yarn: pairs that turn less often are interpolated.")
    attention_factor: Positive | None = Field(default=None, description="yarn: factor of cos and sin (null: 0.1 ln(factor) + 1).")

    @model_validator(mode="after")
    def _knows_the_original_length(self) -> Self:
        if self.kind in ("dynamic_ntk", "yarn", "llama3") and self.original_max_position is None:
            raise ValueError(f"rotary_scaling of kind {self.kind} needs original_max_position, the length the model was trained at")
        return self


def _kv_heads(data: dict[str, Any]) -> int:
    return int(data.get("num_heads", 1))


def _head_dim(data: dict[str, Any]) -> int:
    return int(data.get("hidden_size", 1)) // int(data.get("num_heads", 1))


def _ffn_hidden_size(data: dict[str, Any]) -> int:
    return 4 * int(data.get("hidden_size", 1))


def _like_bias(data: dict[str, Any]) -> bool:
    return bool(data.get("bias", False))


def _residual_scale(data: dict[str, Any]) -> float:
    """DeepNorm's alpha of a decoder (Wang et al. 2022, table 1)."""
    return float((2 * int(data.get("num_layers", 1))) ** 0.25) if data.get("init") == "deepnorm" else 1.0


def _mup_base_head_dim(data: dict[str, Any]) -> int:
    return int(data.get("head_dim", 1))


def _attention_scale(data: dict[str, Any]) -> float | None:
    """Under muP 1 / head_dim, times what makes it head_dim ** -0.5 at the base (Yang et al. 2022, definition 4.1)."""
    if data.get("init") != "mup":
        return None
    return float(math.sqrt(data.get("mup_base_head_dim", 1)) / data.get("head_dim", 1))


def _logits_scale(data: dict[str, Any]) -> float:
    """Under muP the inverse of how many times wider the model is than its base (Yang et al. 2022, table 8, output weights)."""
    base = data.get("mup_base_width") if data.get("init") == "mup" else None
    return 1.0 if base is None else float(base / data.get("hidden_size", 1))


# Which fields a derived default reads, in TransformerConfig; whoever lacks one of them lacks the derived field too.
DERIVED_FROM: Final[dict[str, tuple[str, ...]]] = {
    "num_kv_heads": ("num_heads",),
    "head_dim": ("hidden_size", "num_heads"),
    "ffn_hidden_size": ("hidden_size",),
    "qkv_bias": ("bias",),
    "out_bias": ("bias",),
    "mlp_bias": ("bias",),
    "norm_bias": ("bias",),
    "residual_scale": ("init", "num_layers"),
    "mup_base_head_dim": ("head_dim",),
    "attention_scale": ("init", "mup_base_head_dim", "head_dim"),
    "logits_scale": ("init", "mup_base_width", "hidden_size"),
}


class TransformerConfig(BaseModel):
    """The shape of a transformer language model: embedding, blocks of attention and feed-forward, projection to the vocabulary.

    Raises pydantic's ValidationError (a ValueError) on construction when a rule is broken, with every broken rule in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_layers: Count = Field(description="Transformer layers, each one attention and one feed-forward block.")
    hidden_size: Count = Field(description="Width of the residual stream.")
    num_heads: Count = Field(description="Query heads of every attention block.")
    num_kv_heads: Count = Field(
        default_factory=_kv_heads, description="Key and value heads; fewer than num_heads is grouped-query attention."
    )
    head_dim: Count = Field(default_factory=_head_dim, description="Width of one head; by default hidden_size / num_heads.")
    ffn_hidden_size: Count = Field(
        default_factory=_ffn_hidden_size, description="Inner width of the feed-forward block; by default 4 * hidden_size."
    )
    init: Initialization = Field(
        default="depth_scaled",
        description="How weights start: normal; depth_scaled, with smaller output projections (GPT-2); small_init (GPT-NeoX); xavier; fan_in (PaLM); "
        "tfixup, for a model without norms or warmup; deepnorm, for a deep one with post-norms; mup, whose best rates hold at every width.",
    )
    init_std: Positive = Field(default=0.02, description="Standard deviation of the initial weights, for normal, depth_scaled and mup.")
    mup_base_width: Count | None = Field(
        default=None, description="mup: hidden_size at which it is the same as normal, where rates were found."
    )
    mup_base_head_dim: Count = Field(
        default_factory=_mup_base_head_dim,
        description="mup: head_dim of the model of mup_base_width; by default head_dim, so that heads grow in number.",
    )
    vocab_size: Count = Field(description="Tokens the model knows, before padding to a multiple of tp.")
    max_seq_len: Count = Field(description="Longest sequence in tokens; the rows of learned positions.")
    objective: Objective = Field(
        default="causal_lm",
        description="What is learned: the next token; masked_lm, hidden tokens from those on both sides (BERT); permutation_lm, tokens in a random order, "
        "each from those on both sides that came before it (XLNet).",
    )
    position: Position = Field(
        default="rotary",
        description="How positions enter: a learned table, rotation of queries and keys, ALiBi's penalty on distance, or relative, "
        "by a projection of the distance (XLNet).",
    )
    rotary_base: Positive = Field(default=10000.0, description="Base of the rotary frequencies (RoFormer, section 3.4.2).")
    rotary_dim: Count | None = Field(default=None, description="Numbers of a head that are rotated (null: all of head_dim).")
    rotary_interleaved: bool = Field(
        default=False, description="Whether pairs are neighbours (GPT-J) instead of halves apart (LLaMA, NeoX)."
    )
    rotary_scaling: RotaryScaling | None = Field(default=None, description="How rotary frequencies are stretched to longer contexts.")
    alibi_scale: Positive = Field(default=1.0, description="Factor of ALiBi's slopes (Falcon-RW: head_dim ** -0.5).")
    block: BlockKind = Field(
        default="sequential",
        description="Attention then feed-forward, or both at once on the same stream (GPT-J, PaLM), with a norm each or one for both.",
    )
    norm: Norm = Field(default="rmsnorm", description="Kind of normalization.")
    norm_position: NormPosition = Field(
        default="pre",
        description="pre: before each branch; post: after each sum (Vaswani et al. 2017); branch: on what is added (OLMo 2); "
        "sandwich: before a branch and on its output (Gemma 2); none: nowhere (T-Fixup).",
    )
    residual_scale: Positive = Field(
        default_factory=_residual_scale,
        description="Factor of the residual stream in every sum before a post-norm; by default 1, under deepnorm (2 * num_layers) ** 0.25.",
    )
    norm_eps: Positive = Field(default=1e-5, description="Added to the variance or mean square inside the norm.")
    norm_weight: bool = Field(default=True, description="Whether norms have a learned scale (OLMo 1 has none).")
    query_key_norm: QueryKeyNorm = Field(
        default="none", description="RMSNorm of queries and keys: over each head (Qwen 3), or over all heads together (OLMo 2)."
    )
    num_token_types: NonNegativeWhole = Field(
        default=0, description="Rows of a table of which the first is added to every token's embedding (BERT's segments: 2)."
    )
    embedding_norm: bool = Field(default=False, description="Whether a norm follows the embeddings (BLOOM).")
    embedding_scale: Positive = Field(default=1.0, description="Factor of the token embeddings (Gemma: the root of hidden_size).")
    activation: Activation = Field(default="swiglu", description="Feed-forward nonlinearity; the ...glu ones have a third, gating matrix.")
    num_experts: NonNegativeWhole = Field(
        default=0,
        description="Feed-forward layers side by side in every layer, of which a router picks a few for each token; 0: one for all.",
    )
    experts_per_token: Count = Field(default=2, description="Experts that each token goes through (Mixtral: 2).")
    renormalize_experts: bool = Field(
        default=True, description="Whether the router's weights of a token's experts are divided by their sum (Mixtral)."
    )
    router_aux_loss: NonNegative = Field(
        default=0.0,
        description="Weight of the loss that keeps the experts evenly used, over each sequence by itself (DeepSeek-V3, section 2.1.2).",
    )
    bias: bool = Field(
        default=False, description="Whether linear layers and LayerNorm have a bias (GPT-2 yes, LLaMA no), but for those below."
    )
    qkv_bias: bool = Field(default_factory=_like_bias, description="Whether queries, keys and values have a bias; by default as bias.")
    out_bias: bool = Field(default_factory=_like_bias, description="Whether attention's output projection has a bias; by default as bias.")
    mlp_bias: bool = Field(default_factory=_like_bias, description="Whether the feed-forward layers have a bias; by default as bias.")
    norm_bias: bool = Field(default_factory=_like_bias, description="Whether LayerNorm has a bias; by default as bias.")
    head_transform: bool = Field(
        default=False, description="Whether a dense layer with activation and norm stands before the output projection (BERT)."
    )
    head_bias: bool = Field(default=False, description="Whether the output projection has a bias (GPT-J).")
    tie_embeddings: bool = Field(default=False, description="Whether the output projection shares the token embedding's weights.")
    attention_window: Count | None = Field(
        default=None, description="Sliding window: a token sees itself and the window - 1 before it (null: all)."
    )
    attention_pattern: tuple[AttentionKind, ...] | None = Field(
        default=None, strict=False, description="Which layers have the window, repeated over the layers (null: all of them)."
    )
    attention_softcap: Positive | None = Field(default=None, description="Scores become cap * tanh(score / cap) (Gemma 2).")
    attention_scale: Positive | None = Field(
        default_factory=_attention_scale,
        description="Factor of query-key products (null: head_dim ** -0.5); by default null, under mup by 1 / head_dim.",
    )
    logits_softcap: Positive | None = Field(default=None, description="Logits become cap * tanh(logit / cap) (Gemma 2).")
    logits_scale: Positive = Field(
        default_factory=_logits_scale, description="Factor of the logits (Cohere); by default 1, under mup mup_base_width / hidden_size."
    )
    z_loss: NonNegative = Field(default=0.0, description="Weight of the squared log-normalizer in the loss (PaLM, section 5: 1e-4).")
    embedding_dropout: Dropout = Field(default=0.0, description="Dropout probability after the embeddings.")
    hidden_dropout: Dropout = Field(default=0.0, description="Dropout probability on each block's output, before the residual sum.")
    attention_dropout: Dropout = Field(default=0.0, description="Dropout probability on the attention weights.")

    @model_validator(mode="after")
    def _obeys_the_shape_rules(self) -> Self:
        errors = [error for rule in SHAPE_RULES for error in rule(self)]
        if errors:
            raise ValueError("\n".join(str(error) for error in errors))
        return self

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block has a gate and an up projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it, so that the model can continue a text."""
        return self.objective == "causal_lm"

    @property
    def has_query_stream(self) -> bool:
        """Whether training has a second stream of rows, which know where a predicted token stands and not what it is."""
        return self.objective == "permutation_lm"

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm stands before the output projection: not where the last block ends with one, or there are none."""
        return self.norm_position not in ("post", "none")

    @property
    def norms_per_layer(self) -> int:
        """Norms of the residual stream in one layer; those of queries and keys are counted with attention."""
        if self.norm_position == "none":
            return 0
        if self.norm_position == "sandwich":
            return 4
        return 1 if self.block == "parallel_one_norm" else 2

    @property
    def mup_width_factor(self) -> float:
        """How many times wider than its base a muP model is; 1 for others."""
        return 1.0 if self.init != "mup" or self.mup_base_width is None else self.hidden_size / self.mup_base_width

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of layer `layer` (global number), None where it sees all."""
        if self.attention_pattern is not None and self.attention_pattern[layer % len(self.attention_pattern)] == "full":
            return None
        return self.attention_window

    def num_parameters(self) -> int:
        """Return the exact number of trainable numbers, without vocabulary padding; tied weights count once."""
        embedding = self.vocab_size * self.hidden_size
        positions = self.max_seq_len * self.hidden_size if self.position == "learned" else 0
        token_types = (self.num_token_types + int(self.has_query_stream)) * self.hidden_size
        norms = self.num_layers * self.norms_per_layer + int(self.has_final_norm) + int(self.embedding_norm) + int(self.head_transform)
        head = (0 if self.tie_embeddings else embedding) + (self.vocab_size if self.head_bias else 0)
        if self.head_transform:
            head += self.hidden_size * self.hidden_size + (self.hidden_size if self.mlp_bias else 0)
        layers = self.num_layers * (self._layer_matrix_parameters() + self._layer_vectors())
        return embedding + positions + token_types + norms * self._norm_parameters() + layers + head

    def num_active_parameters(self) -> int:
        """Return how many of the parameters one token meets: of the experts only those that it goes through."""
        unused = self._layer_matrix_parameters() - self._layer_matrix_parameters(self.experts_per_token)
        return self.num_parameters() - self.num_layers * unused

    def flops_per_token(self, seq_len: int) -> float:
        """Return the matrix-multiplication FLOPs of training on one token, forward and backward.

        6 FLOPs per matrix parameter that the token meets (one multiply-add forward, two backward) plus the attention scores and their product
        with the values, 12 * layers * heads * head_dim * seq_len; the causal half is not taken off. PaLM paper, appendix B;
        the same count as Megatron-LM (Narayanan et al. 2021, section 5.1) without its recomputed forward. What relative positions and a query
        stream add is not counted.

        Args:
            seq_len: tokens of one sequence.
        """
        return 3.0 * (self.num_layers * self.layer_forward_flops(seq_len) + self.head_forward_flops())

    def layer_forward_flops(self, seq_len: int) -> float:
        """Return the forward matrix-multiplication FLOPs of one layer for one token at `seq_len` tokens; the causal half is not taken off."""
        return 2.0 * self._layer_matrix_parameters(self.experts_per_token) + 4.0 * self.num_heads * self.head_dim * seq_len

    def head_forward_flops(self) -> float:
        """Return the forward FLOPs of the output projection, and of the dense layer before it, for one token."""
        return 2.0 * (self.vocab_size + (self.hidden_size if self.head_transform else 0)) * self.hidden_size

    def padded_vocab_size(self, tp: int) -> int:
        """Return vocab_size rounded up to a multiple of tp, so that every tp rank holds the same number of rows."""
        return math.ceil(self.vocab_size / tp) * tp

    def _layer_matrix_parameters(self, experts_used: int | None = None) -> int:
        """Matrix parameters of one layer; of the experts only `experts_used`, where given."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (queries + 2 * keys) + queries * self.hidden_size
        matrices = (3 if self.is_gated else 2) * self.hidden_size * self.ffn_hidden_size
        if self.num_experts == 0:
            return attention + matrices
        return attention + self.num_experts * self.hidden_size + (experts_used or self.num_experts) * matrices

    def _layer_vectors(self) -> int:
        """Biases, the scales of the queries' and keys' norms, and the projection of distances, which no token goes through."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        into_ffn = 2 if self.is_gated else 1
        total = (queries + 2 * keys if self.qkv_bias else 0) + (self.hidden_size if self.out_bias else 0)
        total += into_ffn * self.ffn_hidden_size + self.hidden_size if self.mlp_bias else 0
        total += queries * self.hidden_size + 2 * queries if self.position == "relative" else 0
        return total + {"none": 0, "head": 2 * self.head_dim, "width": queries + keys}[self.query_key_norm]

    def _norm_parameters(self) -> int:
        return self.hidden_size * (int(self.norm_weight) + int(self.norm == "layernorm" and self.norm_bias))
