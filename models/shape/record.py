"""The fields of TransformerConfig: the size of every matrix and the structure of the blocks. No torch."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from trimaran.models.fields import (
    Count,
    Derived,
    Dropout,
    NonNegative,
    NonNegativeWhole,
    Positive,
)
from trimaran.models.shape.choices import (
    GATED_ACTIVATIONS,
    Activation,
    AttentionKind,
    BlockKind,
    Initialization,
    Norm,
    NormPosition,
    Objective,
    Position,
    QueryKeyNorm,
    RotaryScaling,
    ScoreHeadKind,
    default_attention_scale,
    default_logits_scale,
    default_residual_scale,
)

_LIKE_BIAS: Final = Derived(lambda bias: bias, "as bias")


class TransformerShape(BaseModel):
    """What a transformer language model is, field by field; `models.config` has the rules and what follows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_layers: Count = Field(description="Transformer layers, each one attention and one feed-forward block.")
    hidden_size: Count = Field(description="Width of the residual stream.")
    num_heads: Count = Field(description="Query heads of every attention block.")
    num_kv_heads: Count = Field(
        default_factory=Derived(lambda num_heads: num_heads, "num_heads"),
        description="Key and value heads; fewer than num_heads is grouped-query attention.",
    )
    head_dim: Count = Field(
        default_factory=Derived(lambda hidden_size, num_heads: hidden_size // num_heads, "hidden_size / num_heads"),
        description="Width of one head; by default hidden_size / num_heads.",
    )
    ffn_hidden_size: Count = Field(
        default_factory=Derived(lambda hidden_size: 4 * hidden_size, "4 * hidden_size"),
        description="Inner width of the feed-forward block; by default 4 * hidden_size.",
    )
    init: Initialization = Field(
        default="depth_scaled",
        description="How weights start: normal; depth_scaled, with smaller output projections (GPT-2); small_init "
        "(GPT-NeoX); xavier; fan_in (PaLM); tfixup, for a model without norms or warmup; deepnorm, for a deep one with "
        "post-norms; mup, whose best rates hold at every width.",
    )
    init_std: Positive = Field(
        default=0.02, description="Standard deviation of the initial weights, for normal, depth_scaled and mup."
    )
    mup_base_width: Count | None = Field(
        default=None, description="mup: hidden_size at which it is the same as normal, where rates were found."
    )
    mup_base_head_dim: Count = Field(
        default_factory=Derived(lambda head_dim: head_dim, "as head_dim"),
        description="mup: head_dim of the model of mup_base_width; by default head_dim, so that heads grow in number.",
    )
    vocab_size: Count = Field(description="Tokens the model knows, before padding to a multiple of tp.")
    max_seq_len: Count = Field(description="Longest sequence in tokens; the rows of learned positions.")
    objective: Objective = Field(
        default="causal_lm",
        description="What is learned: the next token; masked_lm, hidden tokens from those on both sides (BERT); "
        "permutation_lm, tokens in a random order, each from those on both sides that came before it (XLNet).",
    )
    position: Position = Field(
        default="rotary",
        description="How positions enter: a learned table, rotation of queries and keys, ALiBi's penalty on distance, "
        "or relative, by a projection of the distance (XLNet).",
    )
    rotary_base: Positive = Field(
        default=10000.0, description="Base of the rotary frequencies (RoFormer, section 3.4.2)."
    )
    rotary_dim: Count | None = Field(
        default=None, description="Numbers of a head that are rotated (null: all of head_dim)."
    )
    rotary_interleaved: bool = Field(
        default=False, description="Whether pairs are neighbours (GPT-J) instead of halves apart (LLaMA, NeoX)."
    )
    rotary_scaling: RotaryScaling | None = Field(
        default=None, description="How rotary frequencies are stretched to longer contexts."
    )
    alibi_scale: Positive = Field(default=1.0, description="Factor of ALiBi's slopes (Falcon-RW: head_dim ** -0.5).")
    block: BlockKind = Field(
        default="sequential",
        description="Attention then feed-forward, or both at once on the same stream (GPT-J, PaLM), with a norm each "
        "or one for both.",
    )
    norm: Norm = Field(default="rmsnorm", description="Kind of normalization.")
    norm_position: NormPosition = Field(
        default="pre",
        description="pre: before each branch; post: after each sum (Vaswani et al. 2017); branch: on what is added "
        "(OLMo 2); sandwich: before a branch and on its output (Gemma 2); none: nowhere (T-Fixup).",
    )
    residual_scale: Positive = Field(
        default_factory=Derived(default_residual_scale, "what init asks for"),
        description="Factor of the residual stream in every sum before a post-norm; by default 1, under deepnorm (2 * "
        "num_layers) ** 0.25.",
    )
    norm_eps: Positive = Field(default=1e-5, description="Added to the variance or mean square inside the norm.")
    norm_weight: bool = Field(default=True, description="Whether norms have a learned scale (OLMo 1 has none).")
    query_key_norm: QueryKeyNorm = Field(
        default="none",
        description="RMSNorm of queries and keys: over each head (Qwen 3), or over all heads together (OLMo 2).",
    )
    num_token_types: NonNegativeWhole = Field(
        default=0,
        description="Rows of a table of which the first is added to every token's embedding (BERT's segments: 2).",
    )
    embedding_norm: bool = Field(default=False, description="Whether a norm follows the embeddings (BLOOM).")
    embedding_scale: Positive = Field(
        default=1.0, description="Factor of the token embeddings (Gemma: the root of hidden_size)."
    )
    activation: Activation = Field(
        default="swiglu", description="Feed-forward nonlinearity; the ...glu ones have a third, gating matrix."
    )
    num_experts: NonNegativeWhole = Field(
        default=0,
        description="Feed-forward layers side by side in every layer, of which a router picks a few for each token; 0: "
        "one for all.",
    )
    experts_per_token: Count = Field(default=2, description="Experts that each token goes through (Mixtral: 2).")
    renormalize_experts: bool = Field(
        default=True,
        description="Whether the router's weights of a token's experts are divided by their sum (Mixtral).",
    )
    router_aux_loss: NonNegative = Field(
        default=0.0,
        description="Weight of the loss that keeps the experts evenly used, over each sequence by itself (DeepSeek-V3, "
        "section 2.1.2).",
    )
    bias: bool = Field(
        default=False,
        description="Whether linear layers and LayerNorm have a bias (GPT-2 yes, LLaMA no), but for those below.",
    )
    qkv_bias: bool = Field(
        default_factory=_LIKE_BIAS, description="Whether queries, keys and values have a bias; by default as bias."
    )
    out_bias: bool = Field(
        default_factory=_LIKE_BIAS, description="Whether attention's output projection has a bias; by default as bias."
    )
    mlp_bias: bool = Field(
        default_factory=_LIKE_BIAS, description="Whether the feed-forward layers have a bias; by default as bias."
    )
    norm_bias: bool = Field(default_factory=_LIKE_BIAS, description="Whether LayerNorm has a bias; by default as bias.")
    head_transform: bool = Field(
        default=False,
        description="Whether a dense layer with activation and norm stands before the output projection (BERT).",
    )
    head_bias: bool = Field(default=False, description="Whether the output projection has a bias (GPT-J).")
    tie_embeddings: bool = Field(
        default=False, description="Whether the output projection shares the token embedding's weights."
    )
    score_head: ScoreHeadKind = Field(
        default="none",
        description="A projection to one number: none; only, in place of that to the vocabulary (a reward model); "
        "beside, with it (PPO's values).",
    )
    attention_window: Count | None = Field(
        default=None, description="Sliding window: a token sees itself and the window - 1 before it (null: all)."
    )
    attention_pattern: tuple[AttentionKind, ...] | None = Field(
        default=None,
        strict=False,
        description="Which layers have the window, repeated over the layers (null: all of them).",
    )
    attention_softcap: Positive | None = Field(
        default=None, description="Scores become cap * tanh(score / cap) (Gemma 2)."
    )
    attention_scale: Positive | None = Field(
        default_factory=Derived(default_attention_scale, "what init asks for"),
        description="Factor of query-key products (null: head_dim ** -0.5); by default null, under mup by 1 / "
        "head_dim.",
    )
    logits_softcap: Positive | None = Field(
        default=None, description="Logits become cap * tanh(logit / cap) (Gemma 2)."
    )
    logits_scale: Positive = Field(
        default_factory=Derived(default_logits_scale, "what init asks for"),
        description="Factor of the logits (Cohere); by default 1, under mup mup_base_width / hidden_size.",
    )
    z_loss: NonNegative = Field(
        default=0.0, description="Weight of the squared log-normalizer in the loss (PaLM, section 5: 1e-4)."
    )
    label_smoothing: Dropout = Field(
        default=0.0, description="Share of the target that is spread evenly over the vocabulary (Szegedy et al. 2016)."
    )
    embedding_dropout: Dropout = Field(default=0.0, description="Dropout probability after the embeddings.")
    hidden_dropout: Dropout = Field(
        default=0.0, description="Dropout probability on each block's output, before the residual sum."
    )
    first_hidden_dropout: Dropout | None = Field(
        default=None,
        description="hidden_dropout of the first block, from where it grows by equal steps to hidden_dropout in the "
        "last (LIMA, Zhou et al. 2023: 0.0 to 0.3); null: all blocks have hidden_dropout.",
    )
    attention_dropout: Dropout = Field(default=0.0, description="Dropout probability on the attention weights.")

    def hidden_dropout_of(self, layer: int) -> float:
        """Return the dropout probability on the output of a block, by its global number."""
        if self.first_hidden_dropout is None or self.num_layers == 1:
            return self.hidden_dropout
        share = layer / (self.num_layers - 1)
        return self.first_hidden_dropout + share * (self.hidden_dropout - self.first_hidden_dropout)

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
        """Whether training has a second stream of rows, which know the position of a predicted token alone."""
        return self.objective == "permutation_lm"

    @property
    def has_head(self) -> bool:
        """Whether the last layer is followed by a projection to the vocabulary."""
        return self.score_head != "only"

    @property
    def ties_head(self) -> bool:
        """Whether the projection to the vocabulary reads the token embedding's weights."""
        return self.tie_embeddings and self.has_head

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm stands before the output projection; not where the last block ends with one."""
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
