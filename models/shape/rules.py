"""The rules between the fields of TransformerConfig. No torch."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.fields import (
    FieldError,
    RuleTable,
    nearest_divisors,
    nearest_multiples,
    one_of,
)
from trimaran.models.shape.record import TransformerShape

SHAPE_RULES: Final = RuleTable[[TransformerShape]]()


@SHAPE_RULES.needs("num_heads", "num_kv_heads")
def _kv_heads_divide_heads(config: TransformerShape) -> Iterator[FieldError]:
    if config.num_heads % config.num_kv_heads:
        valid = one_of(nearest_divisors(config.num_heads, config.num_kv_heads))
        rule = f"num_heads ({config.num_heads}) must be divisible by num_kv_heads ({config.num_kv_heads})"
        yield FieldError("num_kv_heads", rule, config.num_kv_heads, f"set num_kv_heads to {valid}")


@SHAPE_RULES.needs("hidden_size", "num_heads", "head_dim")
def _heads_fill_hidden_size(config: TransformerShape) -> Iterator[FieldError]:
    hidden_size, num_heads = config.hidden_size, config.num_heads
    if "head_dim" not in config.model_fields_set and num_heads * config.head_dim != hidden_size:
        sizes = one_of(nearest_multiples(num_heads, hidden_size))
        heads = one_of(nearest_divisors(hidden_size, num_heads))
        rule = f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads}) when head_dim is not given"
        fix = f"set hidden_size to {sizes}, or num_heads to {heads}, or give head_dim"
        yield FieldError("hidden_size", rule, hidden_size, fix)


@SHAPE_RULES.needs("position", "rotary_scaling")
def _only_rotary_positions_are_stretched(config: TransformerShape) -> Iterator[FieldError]:
    if config.position != "rotary" and config.rotary_scaling is not None:
        rule = f"stretches rotary positions, and position is {config.position}"
        fix = "set rotary_scaling to null, or position to rotary"
        yield FieldError("rotary_scaling", rule, config.rotary_scaling.kind, fix)


@SHAPE_RULES.needs("position", "rotary_scaling", "rotary_dim", "head_dim")
def _ntk_has_two_pairs(config: TransformerShape) -> Iterator[FieldError]:
    kind = _rotary_scaling_kind(config)
    if kind in ("ntk", "dynamic_ntk") and (config.rotary_dim or config.head_dim) < 4:
        rule = f"of kind {kind} needs two rotated pairs or more"
        yield FieldError("rotary_scaling", rule, kind, "set rotary_dim to 4 or more")


@SHAPE_RULES.needs("position", "rotary_scaling", "rotary_base")
def _rotary_base_has_a_logarithm(config: TransformerShape) -> Iterator[FieldError]:
    kind = _rotary_scaling_kind(config)
    if kind in ("ntk", "dynamic_ntk", "yarn") and config.rotary_base <= 1:
        rule = f"must be above 1 with rotary_scaling of kind {kind}"
        yield FieldError("rotary_base", rule, config.rotary_base, "set it to 10000")


def _rotary_scaling_kind(config: TransformerShape) -> str | None:
    scaling = config.rotary_scaling if config.position == "rotary" else None
    return None if scaling is None else scaling.kind


@SHAPE_RULES.needs("position", "rotary_dim", "head_dim")
def _rotary_pairs_up(config: TransformerShape) -> Iterator[FieldError]:
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
def _parallel_block_is_pre_norm(config: TransformerShape) -> Iterator[FieldError]:
    block, norms = config.block, config.norm_position
    if block != "sequential" and norms not in ("pre", "none"):
        rule = f"a block of kind {block} has its norms before the branches, got norm_position {norms}"
        yield FieldError("norm_position", rule, norms, "set norm_position to pre, or block to sequential")


@SHAPE_RULES.needs("attention_pattern")
def _pattern_names_layers(config: TransformerShape) -> Iterator[FieldError]:
    if config.attention_pattern == ():
        yield FieldError("attention_pattern", "must name at least one layer", (), "write full or window, or null")


@SHAPE_RULES.needs("attention_pattern", "attention_window")
def _pattern_has_a_window(config: TransformerShape) -> Iterator[FieldError]:
    if "window" in (config.attention_pattern or ()) and config.attention_window is None:
        rule = "attention_pattern has layers with a window, and attention_window is not given"
        yield FieldError("attention_window", rule, None, "set attention_window to the tokens that such a layer sees")


@SHAPE_RULES.needs("init", "norm_position")
def _initialization_fits_the_norms(config: TransformerShape) -> Iterator[FieldError]:
    if config.init == "tfixup" and config.norm_position != "none":
        rule = f"init tfixup is for a model without norms, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to none, or init to depth_scaled")
    if config.init == "deepnorm" and config.norm_position != "post":
        rule = f"init deepnorm is for norms after the sums, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to post, or init to depth_scaled")


@SHAPE_RULES.needs("residual_scale", "norm_position")
def _scaled_residuals_are_normed(config: TransformerShape) -> Iterator[FieldError]:
    scale, norms = config.residual_scale, config.norm_position
    if scale != 1.0 and norms != "post":
        rule = f"residual_scale ({scale:g}) needs a norm after the sum, got norm_position {norms}"
        yield FieldError("residual_scale", rule, scale, "set norm_position to post, or residual_scale to 1")


@SHAPE_RULES.needs("init", "mup_base_width")
def _mup_has_a_base(config: TransformerShape) -> Iterator[FieldError]:
    if config.init == "mup" and config.mup_base_width is None:
        fix = "set it to the hidden_size at which the learning rate was found"
        yield FieldError("mup_base_width", "is required by init mup", None, fix)
    elif config.init != "mup" and config.mup_base_width is not None:
        rule = f"mup_base_width ({config.mup_base_width}) says something only with init mup, got init {config.init}"
        yield FieldError("mup_base_width", rule, config.mup_base_width, "set init to mup, or mup_base_width to null")


@SHAPE_RULES.needs("objective", "position")
def _permutations_have_relative_positions(config: TransformerShape) -> Iterator[FieldError]:
    if (config.position == "relative") != config.has_query_stream:
        got = f"{config.objective} and {config.position}"
        rule = f"objective permutation_lm and position relative need each other, got {got}"
        yield FieldError("objective", rule, config.objective, "set both of them, or neither")


@SHAPE_RULES.needs("position", "num_heads", "num_kv_heads")
def _relative_heads_are_not_grouped(config: TransformerShape) -> Iterator[FieldError]:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if config.position == "relative" and kv_heads != heads:
        rule = f"relative positions need as many key-value heads ({kv_heads}) as heads ({heads})"
        yield FieldError("num_kv_heads", rule, kv_heads, f"set num_kv_heads to {heads}")


@SHAPE_RULES.needs("position", may_read=("attention_window", "attention_softcap", "query_key_norm"))
def _relative_attention_is_plain(config: TransformerShape) -> Iterator[FieldError]:
    if config.position != "relative":
        return
    for name, plain in {"attention_window": None, "attention_softcap": None, "query_key_norm": "none"}.items():
        value = getattr(config, name, plain)
        if value != plain:
            rule = f"relative positions do not go with {name} ({value})"
            yield FieldError(name, rule, value, f"leave out {name}")


@SHAPE_RULES.needs("head_transform", "activation")
def _head_transform_has_no_gate(config: TransformerShape) -> Iterator[FieldError]:
    if config.head_transform and config.is_gated:
        rule = f"the dense layer before the output projection has no gate, and activation is {config.activation}"
        yield FieldError("head_transform", rule, True, "set activation to gelu, or head_transform to false")


@SHAPE_RULES.needs("score_head", "objective", "head_transform")
def _scores_are_of_texts_read_forward(config: TransformerShape) -> Iterator[FieldError]:
    if config.score_head != "none" and (config.objective != "causal_lm" or config.head_transform):
        rule = "a score head reads a text from its end, so it needs objective causal_lm and no head_transform"
        yield FieldError("score_head", rule, config.score_head, "set score_head to none")


@SHAPE_RULES.needs("num_experts", "router_aux_loss")
def _router_loss_has_experts(config: TransformerShape) -> Iterator[FieldError]:
    if config.num_experts == 0 and config.router_aux_loss > 0:
        rule = f"router_aux_loss ({config.router_aux_loss:g}) needs experts, and num_experts is 0"
        fix = "set num_experts to 2 or more, or router_aux_loss to 0"
        yield FieldError("router_aux_loss", rule, config.router_aux_loss, fix)


@SHAPE_RULES.needs("num_experts", "experts_per_token")
def _tokens_have_experts(config: TransformerShape) -> Iterator[FieldError]:
    experts, used = config.num_experts, config.experts_per_token
    if 0 < experts < used:
        rule = f"experts_per_token ({used}) must be at most num_experts ({experts})"
        yield FieldError("experts_per_token", rule, used, f"set experts_per_token to {experts} or less")


@SHAPE_RULES.needs("num_experts", "block")
def _experts_stand_in_a_sequential_block(config: TransformerShape) -> Iterator[FieldError]:
    if config.num_experts and config.block != "sequential":
        rule = f"experts need a block of kind sequential, got {config.block}"
        yield FieldError("block", rule, config.block, "set block to sequential, or num_experts to 0")


@SHAPE_RULES.needs("num_experts", "mlp_bias")
def _experts_have_no_bias(config: TransformerShape) -> Iterator[FieldError]:
    if config.num_experts and config.mlp_bias:
        rule = "experts have no bias, and mlp_bias is true"
        yield FieldError("mlp_bias", rule, True, "set mlp_bias to false, or num_experts to 0")
