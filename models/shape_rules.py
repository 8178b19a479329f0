"""The rules that tie the fields of a TransformerConfig together, each a generator of broken rules; a run spec checks its draft by them too. No torch."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from trimaran.models.fields import FieldError, nearest_divisors, nearest_multiples, one_of

if TYPE_CHECKING:
    from trimaran.models.config import TransformerConfig


def _kv_heads_divide_heads(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.num_heads % config.num_kv_heads:
        valid = one_of(nearest_divisors(config.num_heads, config.num_kv_heads))
        rule = f"num_heads ({config.num_heads}) must be divisible by num_kv_heads ({config.num_kv_heads})"
        yield FieldError("num_kv_heads", rule, config.num_kv_heads, f"set num_kv_heads to {valid}")


def _heads_fill_hidden_size(config: "TransformerConfig") -> Iterator[FieldError]:
    if "head_dim" not in config.model_fields_set and config.hidden_size % config.num_heads:
        sizes = one_of(nearest_multiples(config.num_heads, config.hidden_size))
        heads = one_of(nearest_divisors(config.hidden_size, config.num_heads))
        rule = f"hidden_size ({config.hidden_size}) must be divisible by num_heads ({config.num_heads}) when head_dim is not given"
        yield FieldError("hidden_size", rule, config.hidden_size, f"set hidden_size to {sizes}, or num_heads to {heads}, or give head_dim")


def _rotary_pairs_up(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.position != "rotary":
        return
    if config.rotary_dim is not None:
        if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
            rule = f"rotary_dim ({config.rotary_dim}) must be even and at most head_dim ({config.head_dim})"
            yield FieldError(
                "rotary_dim", rule, config.rotary_dim, f"set rotary_dim to {max(2, min(config.rotary_dim, config.head_dim) // 2 * 2)}"
            )
    elif config.head_dim % 2:
        sizes = one_of(size for size in (config.head_dim - 1, config.head_dim + 1) if size > 0)
        rule = f"head_dim ({config.head_dim}) must be even, because rotary positions turn pairs of numbers"
        yield FieldError("head_dim", rule, config.head_dim, f"set head_dim to {sizes}, or position to learned")


def _parallel_block_is_pre_norm(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.block != "sequential" and config.norm_position not in ("pre", "none"):
        rule = f"a block of kind {config.block} has its norms before the branches, got norm_position {config.norm_position}"
        yield FieldError("norm_position", rule, config.norm_position, "set norm_position to pre, or block to sequential")


def _pattern_has_a_window(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.attention_pattern is None:
        return
    if not config.attention_pattern:
        yield FieldError("attention_pattern", "must name at least one layer", (), "write full or window, or null")
    elif "window" in config.attention_pattern and config.attention_window is None:
        rule = "attention_pattern has layers with a window, and attention_window is not given"
        yield FieldError("attention_window", rule, None, "set attention_window to the tokens that such a layer sees")


def _initialization_fits_the_norms(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.init == "tfixup" and config.norm_position != "none":
        rule = f"init tfixup is for a model without norms, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to none, or init to depth_scaled")
    if config.init == "deepnorm" and config.norm_position != "post":
        rule = f"init deepnorm is for norms after the sums, got norm_position {config.norm_position}"
        yield FieldError("init", rule, config.init, "set norm_position to post, or init to depth_scaled")
    if config.residual_scale != 1.0 and config.norm_position != "post":
        rule = f"residual_scale ({config.residual_scale:g}) needs a norm after the sum, got norm_position {config.norm_position}"
        yield FieldError("residual_scale", rule, config.residual_scale, "set norm_position to post, or residual_scale to 1")


def _mup_has_a_base(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.init == "mup" and config.mup_base_width is None:
        fix = "set it to the hidden_size at which the learning rate was found"
        yield FieldError("mup_base_width", "is required by init mup", None, fix)
    elif config.init != "mup" and config.mup_base_width is not None:
        rule = f"mup_base_width ({config.mup_base_width}) says something only with init mup, got init {config.init}"
        yield FieldError("mup_base_width", rule, config.mup_base_width, "set init to mup, or mup_base_width to null")


def _permutations_go_by_distance(config: "TransformerConfig") -> Iterator[FieldError]:
    if (config.position == "relative") != config.has_query_stream:
        rule = f"objective permutation_lm and position relative need each other, got {config.objective} and {config.position}"
        yield FieldError("objective", rule, config.objective, "set both of them, or neither")
    if config.position != "relative":
        return
    if config.num_kv_heads != config.num_heads:
        rule = f"relative positions need as many key-value heads ({config.num_kv_heads}) as heads ({config.num_heads})"
        yield FieldError("num_kv_heads", rule, config.num_kv_heads, f"set num_kv_heads to {config.num_heads}")
    others = {"attention_window": None, "attention_softcap": None, "query_key_norm": "none"}
    for name, plain in others.items():
        if getattr(config, name) != plain:
            rule = f"relative positions do not go with {name} ({getattr(config, name)})"
            yield FieldError(name, rule, getattr(config, name), f"leave out {name}")


def _head_transform_has_no_gate(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.head_transform and config.is_gated:
        rule = f"the dense layer before the output projection has no gate, and activation is {config.activation}"
        yield FieldError("head_transform", rule, True, "set activation to gelu, or head_transform to false")


def _experts_fit(config: "TransformerConfig") -> Iterator[FieldError]:
    if config.num_experts == 0:
        if config.router_aux_loss > 0:
            rule = f"router_aux_loss ({config.router_aux_loss:g}) needs experts, and num_experts is 0"
            yield FieldError("router_aux_loss", rule, config.router_aux_loss, "set num_experts to 2 or more, or router_aux_loss to 0")
        return
    if config.experts_per_token > config.num_experts:
        rule = f"experts_per_token ({config.experts_per_token}) must be at most num_experts ({config.num_experts})"
        yield FieldError("experts_per_token", rule, config.experts_per_token, f"set experts_per_token to {config.num_experts} or less")
    if config.block != "sequential":
        rule = f"experts need a block of kind sequential, got {config.block}"
        yield FieldError("block", rule, config.block, "set block to sequential, or num_experts to 0")
    if config.mlp_bias:
        yield FieldError("mlp_bias", "experts have no bias, and mlp_bias is true", True, "set mlp_bias to false, or num_experts to 0")


ShapeRule = Callable[["TransformerConfig"], Iterator[FieldError]]
SHAPE_RULES: Final[tuple[ShapeRule, ...]] = (
    _kv_heads_divide_heads,
    _heads_fill_hidden_size,
    _rotary_pairs_up,
    _parallel_block_is_pre_norm,
    _pattern_has_a_window,
    _initialization_fits_the_norms,
    _mup_has_a_base,
    _permutations_go_by_distance,
    _head_transform_has_no_gate,
    _experts_fit,
)
