"""TransformerConfig: the shape of a transformer language model, checked whole and free of torch.

It holds the size of every matrix and the structure of the blocks, not how they are cut over ranks. It imports no torch,
so that a wrong shape is refused before torch is loaded.
"""

import math
from collections.abc import Iterator
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimaran.models.choices import (
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
from trimaran.models.fields import (
    Count,
    Derived,
    Dropout,
    FieldError,
    NonNegative,
    NonNegativeWhole,
    Positive,
    RuleTable,
    nearest_divisors,
    nearest_multiples,
    one_of,
)

_LIKE_BIAS: Final = Derived(lambda bias: bias, "as bias")


class TransformerConfig(BaseModel):
    """The shape of a transformer language model: embedding, blocks, projection to the vocabulary.

    Raises pydantic's ValidationError (a ValueError) on construction when a rule is broken, with every broken rule in
    it.
    """

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

    @model_validator(mode="after")
    def _obeys_the_shape_rules(self) -> Self:
        errors = SHAPE_RULES.broken(type(self).model_fields, self)
        if errors:
            raise ValueError("\n".join(str(error) for error in errors))
        return self

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

    def num_parameters(self) -> int:
        """Return the exact number of trainable numbers, without vocabulary padding; tied weights count once."""
        layers = self.num_layers * self.layer_parameters()
        return self.embedding_parameters() + layers + self.head_parameters()

    def embedding_parameters(self) -> int:
        """Return the parameters before the first layer."""
        positions = self.max_seq_len if self.position == "learned" else 0
        vectors = self.vocab_size + positions + self.num_token_types + int(self.has_query_stream)
        return vectors * self.hidden_size + int(self.embedding_norm) * self._norm_parameters()

    def layer_parameters(self) -> int:
        """Return the parameters of one layer."""
        norms = self.norms_per_layer * self._norm_parameters()
        return self._layer_matrix_parameters() + self._layer_vectors() + norms

    def layer_expert_parameters(self) -> int:
        """Return those of one layer's parameters that are in experts."""
        return self._layer_matrix_parameters() - self._layer_matrix_parameters(0) if self.num_experts else 0

    def head_parameters(self) -> int:
        """Return the parameters after the last layer, without a tied projection."""
        projection = self.vocab_size * self.hidden_size if self.has_head and not self.tie_embeddings else 0
        score = self.hidden_size if self.score_head != "none" else 0
        transform = self.hidden_size * (self.hidden_size + int(self.mlp_bias)) if self.head_transform else 0
        norms = (int(self.has_final_norm) + int(self.head_transform)) * self._norm_parameters()
        return projection + (self.vocab_size if self.head_bias and self.has_head else 0) + score + transform + norms

    def num_active_parameters(self) -> int:
        """Return how many of the parameters one token meets: of the experts only those that it goes through."""
        unused = self._layer_matrix_parameters() - self._layer_matrix_parameters(self.experts_per_token)
        return self.num_parameters() - self.num_layers * unused

    def num_parameters_without_embeddings(self) -> int:
        """Return the parameters but the tables of tokens and positions and an untied projection to the vocabulary."""
        positions = self.max_seq_len if self.position == "learned" else 0
        head = self.vocab_size if self.has_head and not self.tie_embeddings else 0
        return self.num_parameters() - (self.vocab_size + positions + head) * self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Return the matrix-multiplication FLOPs of training on one token, forward and backward.

        6 FLOPs per matrix parameter that the token meets (one multiply-add forward, two backward) plus the attention
        scores and their product with the values, 12 * layers * heads * head_dim * seq_len; the causal half is not taken
        off. PaLM paper, appendix B; the same count as Megatron-LM (Narayanan et al. 2021, section 5.1) without its
        recomputed forward. What relative positions and a query stream add is not counted.

        Args:
            seq_len: tokens of one sequence.
        """
        return 3.0 * (self.num_layers * self.layer_forward_flops(seq_len) + self.head_forward_flops())

    def layer_forward_flops(self, seq_len: int) -> float:
        """Return the forward matrix-multiplication FLOPs of one layer for one token, the causal half not taken off."""
        return (
            2.0 * self._layer_matrix_parameters(self.experts_per_token) + 4.0 * self.num_heads * self.head_dim * seq_len
        )

    def head_forward_flops(self) -> float:
        """Return the forward FLOPs of the output projection, and of the dense layer before it, for one token."""
        outputs = (self.vocab_size if self.has_head else 0) + (1 if self.score_head != "none" else 0)
        return 2.0 * (outputs + (self.hidden_size if self.head_transform else 0)) * self.hidden_size

    def padded_vocab_size(self, tp: int) -> int:
        """Return vocab_size rounded up to a multiple of tp, so that every tp rank holds the same number of rows."""
        return math.ceil(self.vocab_size / tp) * tp

    def cuts_kv_heads(self, tp: int) -> bool:
        """Return whether every tp rank has key-value heads of its own, with the query heads that read them.

        Otherwise every rank holds all key-value heads, and the query heads are cut by themselves.
        """
        return _leaves_no_rank_idle(self.num_kv_heads, tp)

    def heads_can_be_cut(self, tp: int) -> bool:
        """Return whether every tp rank gets query heads, evenly or not."""
        return self.cuts_kv_heads(tp) or _leaves_no_rank_idle(self.num_heads, tp)

    def heads_per_rank(self, tp: int) -> int:
        """Return the query heads of a tp rank; where they can't be shared out evenly, the last rank has fewer."""
        if self.cuts_kv_heads(tp):
            return self.kv_heads_per_rank(tp) * (self.num_heads // self.num_kv_heads)
        return _share(self.num_heads, tp)

    def kv_heads_per_rank(self, tp: int) -> int:
        """Return the key-value heads of a tp rank where they are cut; the last rank may have fewer."""
        return _share(self.num_kv_heads, tp)

    def _layer_matrix_parameters(self, experts_used: int | None = None) -> int:
        """Matrix parameters of one layer; of the experts only `experts_used`, where given."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (queries + 2 * keys) + queries * self.hidden_size
        matrices = (3 if self.is_gated else 2) * self.hidden_size * self.ffn_hidden_size
        if self.num_experts == 0:
            return attention + matrices
        used = self.num_experts if experts_used is None else experts_used
        return attention + self.num_experts * self.hidden_size + used * matrices

    def _layer_vectors(self) -> int:
        """Parameters of one layer that no token is multiplied by: biases, scales of norms, projection of distances."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        into_ffn = 2 if self.is_gated else 1
        total = (queries + 2 * keys if self.qkv_bias else 0) + (self.hidden_size if self.out_bias else 0)
        total += into_ffn * self.ffn_hidden_size + self.hidden_size if self.mlp_bias else 0
        total += queries * self.hidden_size + 2 * queries if self.position == "relative" else 0
        return total + {"none": 0, "head": 2 * self.head_dim, "width": queries + keys}[self.query_key_norm]

    def _norm_parameters(self) -> int:
        return self.hidden_size * (int(self.norm_weight) + int(self.norm == "layernorm" and self.norm_bias))


def _share(heads: int, tp: int) -> int:
    return -(-heads // tp)


def _leaves_no_rank_idle(heads: int, tp: int) -> bool:
    """Whether each of the first tp - 1 ranks can take its share, rounded up, and the last still has a head."""
    return _share(heads, tp) * (tp - 1) < heads


SHAPE_RULES: Final = RuleTable[[TransformerConfig]]()


@SHAPE_RULES.needs("num_heads", "num_kv_heads")
def _kv_heads_divide_heads(config: TransformerConfig) -> Iterator[FieldError]:
    if config.num_heads % config.num_kv_heads:
        valid = one_of(nearest_divisors(config.num_heads, config.num_kv_heads))
        rule = f"num_heads ({config.num_heads}) must be divisible by num_kv_heads ({config.num_kv_heads})"
        yield FieldError("num_kv_heads", rule, config.num_kv_heads, f"set num_kv_heads to {valid}")


@SHAPE_RULES.needs("hidden_size", "num_heads", "head_dim")
def _heads_fill_hidden_size(config: TransformerConfig) -> Iterator[FieldError]:
    hidden_size, num_heads = config.hidden_size, config.num_heads
    if "head_dim" not in config.model_fields_set and num_heads * config.head_dim != hidden_size:
        sizes = one_of(nearest_multiples(num_heads, hidden_size))
        heads = one_of(nearest_divisors(hidden_size, num_heads))
        rule = f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads}) when head_dim is not given"
        fix = f"set hidden_size to {sizes}, or num_heads to {heads}, or give head_dim"
        yield FieldError("hidden_size", rule, hidden_size, fix)


@SHAPE_RULES.needs("position", "rotary_scaling")
def _only_rotary_positions_are_stretched(config: TransformerConfig) -> Iterator[FieldError]:
    if config.position != "rotary" and config.rotary_scaling is not None:
        rule = f"stretches rotary positions, and position is {config.position}"
        fix = "set rotary_scaling to null, or position to rotary"
        yield FieldError("rotary_scaling", rule, config.rotary_scaling.kind, fix)


@SHAPE_RULES.needs("position", "rotary_scaling", "rotary_dim", "head_dim")
def _ntk_has_two_pairs(config: TransformerConfig) -> Iterator[FieldError]:
    kind = _rotary_scaling_kind(config)
    if kind in ("ntk", "dynamic_ntk") and (config.rotary_dim or config.head_dim) < 4:
        rule = f"of kind {kind} needs two rotated pairs or more"
        yield FieldError("rotary_scaling", rule, kind, "set rotary_dim to 4 or more")


@SHAPE_RULES.needs("position", "rotary_scaling", "rotary_base")
def _rotary_base_has_a_logarithm(config: TransformerConfig) -> Iterator[FieldError]:
    kind = _rotary_scaling_kind(config)
    if kind in ("ntk", "dynamic_ntk", "yarn") and config.rotary_base <= 1:
        rule = f"must be above 1 with rotary_scaling of kind {kind}"
        yield FieldError("rotary_base", rule, config.rotary_base, "set it to 10000")


def _rotary_scaling_kind(config: TransformerConfig) -> str | None:
    scaling = config.rotary_scaling if config.position == "rotary" else None
    return None if scaling is None else scaling.kind


@SHAPE_RULES.needs("position", "rotary_dim", "head_dim")
def _rotary_pairs_up(config: TransformerConfig) -> Iterator[FieldError]:
    rotary_dim, head_dim = config.rotary_dim, config.head_dim
    if config.position != "rotary":
        return
    if rotary_dim is not None:
        if rotary_dim % 2 or rotary_dim > head_dim:
            rule = f"rotary_dim ({rotary_dim}) must be even and at most head_dim ({head_dim})"
            fix = f"set rotary_dim to {max(2, min(rotary_dim, head_dim) // 2 * 2)}"
            yield FieldError("rotary_dim", rule, rotary_dim, fix)
    elif head_dim % 2:
        sizes = one_of(size for size in (head_dim - 1, head_dim + 1) if size > 0)
        rule = f"head_dim ({head_dim}) must be even, because rotary positions turn pairs of numbers"
        yield FieldError("head_dim", rule, head_dim, f"set head_dim to {sizes}, or position to learned")


@SHAPE_RULES.needs("block", "norm_position")
def _parallel_block_is_pre_norm(config: TransformerConfig) -> Iterator[FieldError]:
    block, norms = config.block, config.norm_position
    if block != "sequential" and norms not in ("pre", "none"):
        rule = f"a block of kind {block} has its norms before the branches, got norm_position {norms}"
        yield FieldError("norm_position", rule, norms, "set norm_position to pre, or block to sequential")


@SHAPE_RULES.needs("attention_pattern")
def _pattern_names_layers(config: TransformerConfig) -> Iterator[FieldError]:
    if config.attention_pattern == ():
        yield FieldError("attention_pattern", "must name at least one layer", (), "write full or window, or null")


@SHAPE_RULES.needs("attention_pattern", "attention_window")
def _pattern_has_a_window(config: TransformerConfig) -> Iterator[FieldError]:
    if "window" in (config.attention_pattern or ()) and config.attention_window is None:
        rule = "attention_pattern has layers with a window, and attention_window is not given"
        yield FieldError("attention_window", rule, None, "set attention_window to the tokens that such a layer sees")


@SHAPE_RULES.needs("init", "norm_position")
def _initialization_fits_the_norms(config: TransformerConfig) -> Iterator[FieldError]:
    if config.init == "tfixup" and config.norm_position != "none":
        rule = f"init tfixup is for a model without norms, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to none, or init to depth_scaled")
    if config.init == "deepnorm" and config.norm_position != "post":
        rule = f"init deepnorm is for norms after the sums, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to post, or init to depth_scaled")


@SHAPE_RULES.needs("residual_scale", "norm_position")
def _scaled_residuals_are_normed(config: TransformerConfig) -> Iterator[FieldError]:
    scale, norms = config.residual_scale, config.norm_position
    if scale != 1.0 and norms != "post":
        rule = f"residual_scale ({scale:g}) needs a norm after the sum, got norm_position {norms}"
        yield FieldError("residual_scale", rule, scale, "set norm_position to post, or residual_scale to 1")


@SHAPE_RULES.needs("init", "mup_base_width")
def _mup_has_a_base(config: TransformerConfig) -> Iterator[FieldError]:
    if config.init == "mup" and config.mup_base_width is None:
        fix = "set it to the hidden_size at which the learning rate was found"
        yield FieldError("mup_base_width", "is required by init mup", None, fix)
    elif config.init != "mup" and config.mup_base_width is not None:
        rule = f"mup_base_width ({config.mup_base_width}) says something only with init mup, got init {config.init}"
        yield FieldError("mup_base_width", rule, config.mup_base_width, "set init to mup, or mup_base_width to null")


@SHAPE_RULES.needs("objective", "position")
def _permutations_have_relative_positions(config: TransformerConfig) -> Iterator[FieldError]:
    if (config.position == "relative") != config.has_query_stream:
        got = f"{config.objective} and {config.position}"
        rule = f"objective permutation_lm and position relative need each other, got {got}"
        yield FieldError("objective", rule, config.objective, "set both of them, or neither")


@SHAPE_RULES.needs("position", "num_heads", "num_kv_heads")
def _relative_heads_are_not_grouped(config: TransformerConfig) -> Iterator[FieldError]:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if config.position == "relative" and kv_heads != heads:
        rule = f"relative positions need as many key-value heads ({kv_heads}) as heads ({heads})"
        yield FieldError("num_kv_heads", rule, kv_heads, f"set num_kv_heads to {heads}")


@SHAPE_RULES.needs("position", may_read=("attention_window", "attention_softcap", "query_key_norm"))
def _relative_attention_is_plain(config: TransformerConfig) -> Iterator[FieldError]:
    if config.position != "relative":
        return
    for name, plain in {"attention_window": None, "attention_softcap": None, "query_key_norm": "none"}.items():
        value = getattr(config, name, plain)
        if value != plain:
            rule = f"relative positions do not go with {name} ({value})"
            yield FieldError(name, rule, value, f"leave out {name}")


@SHAPE_RULES.needs("head_transform", "activation")
def _head_transform_has_no_gate(config: TransformerConfig) -> Iterator[FieldError]:
    if config.head_transform and config.is_gated:
        rule = f"the dense layer before the output projection has no gate, and activation is {config.activation}"
        yield FieldError("head_transform", rule, True, "set activation to gelu, or head_transform to false")


@SHAPE_RULES.needs("score_head", "objective", "head_transform")
def _scores_are_of_texts_read_forward(config: TransformerConfig) -> Iterator[FieldError]:
    if config.score_head != "none" and (config.objective != "causal_lm" or config.head_transform):
        rule = "a score head reads a text from its end, so it needs objective causal_lm and no head_transform"
        yield FieldError("score_head", rule, config.score_head, "set score_head to none")


@SHAPE_RULES.needs("num_experts", "router_aux_loss")
def _router_loss_has_experts(config: TransformerConfig) -> Iterator[FieldError]:
    if config.num_experts == 0 and config.router_aux_loss > 0:
        rule = f"router_aux_loss ({config.router_aux_loss:g}) needs experts, and num_experts is 0"
        fix = "set num_experts to 2 or more, or router_aux_loss to 0"
        yield FieldError("router_aux_loss", rule, config.router_aux_loss, fix)


@SHAPE_RULES.needs("num_experts", "experts_per_token")
def _tokens_have_experts(config: TransformerConfig) -> Iterator[FieldError]:
    experts, used = config.num_experts, config.experts_per_token
    if 0 < experts < used:
        rule = f"experts_per_token ({used}) must be at most num_experts ({experts})"
        yield FieldError("experts_per_token", rule, used, f"set experts_per_token to {experts} or less")


@SHAPE_RULES.needs("num_experts", "block")
def _experts_stand_in_a_sequential_block(config: TransformerConfig) -> Iterator[FieldError]:
    if config.num_experts and config.block != "sequential":
        rule = f"experts need a block of kind sequential, got {config.block}"
        yield FieldError("block", rule, config.block, "set block to sequential, or num_experts to 0")


@SHAPE_RULES.needs("num_experts", "mlp_bias")
def _experts_have_no_bias(config: TransformerConfig) -> Iterator[FieldError]:
    if config.num_experts and config.mlp_bias:
        rule = "experts have no bias, and mlp_bias is true"
        yield FieldError("mlp_bias", rule, True, "set mlp_bias to false, or num_experts to 0")
