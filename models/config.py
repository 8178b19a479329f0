"""TransformerConfig: the shape of a decoder-only transformer, checked whole and free of torch.

The record is what every other room reads: it says how big each matrix is, never how it is cut.
Imports no torch, so that a wrong shape is refused before anything heavy is loaded.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Position = Literal["learned", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]
GATED_ACTIVATIONS: Final = ("swiglu", "geglu", "geglu_tanh")


@dataclass(frozen=True)
class FieldError:
    """One broken rule: which field, what the rule says, the value that broke it, and what would do instead."""

    field: str
    rule: str
    value: object
    suggestion: str = ""
    line: int | None = None  # line of the spec file, counted from 1, where there is one

    def __str__(self) -> str:
        place = self.field if self.line is None else f"{self.field} (line {self.line})"
        text = f"{place}: {self.rule}" + (f"; {self.suggestion}" if self.suggestion else "")
        # Names and values come from a file: a control character in them must not reach the terminal.
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

    def under(self, section: str) -> "FieldError":
        """Return the same error with its field path placed under `section`."""
        return replace(self, field=f"{section}.{self.field}")


def one_of(values: Iterable[object]) -> str:
    """Return the values as a person lists them: `1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest_divisors(number: int, wanted: int, count: int = 6) -> list[int]:
    """Return the `count` divisors of `number` that lie nearest to `wanted` (on a log scale), ascending."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    return sorted(sorted(divisors, key=lambda divisor: abs(math.log(divisor / max(wanted, 1))))[:count])


def nearest_multiples(step: int, wanted: int) -> list[int]:
    """Return the positive multiples of `step` around `wanted`: one, or the two on either side of it."""
    below = wanted // step * step
    return sorted({multiple for multiple in (below, below + step if below != wanted else below) if multiple > 0})


def _integral(value: object) -> object:
    # YAML gives 1e3 as a float; every other float is refused by the strict integer type behind this.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Stands last in an Annotated: it runs first, and the ranges before it reach the JSON schema.
INTEGRAL: Final = BeforeValidator(_integral)
# 31 bits: whatever is larger is a slip of the keyboard, and error messages factor these numbers.
Count = Annotated[int, Field(ge=1, le=2**31 - 1), INTEGRAL]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dropout = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def _kv_heads(data: dict[str, Any]) -> int:
    return int(data.get("num_heads", 1))


def _head_dim(data: dict[str, Any]) -> int:
    return int(data.get("hidden_size", 1)) // int(data.get("num_heads", 1))


def _ffn_hidden_size(data: dict[str, Any]) -> int:
    return 4 * int(data.get("hidden_size", 1))


# Which fields a derived default reads, in TransformerConfig; whoever lacks one of them lacks the derived field too.
DERIVED_FROM: Final[dict[str, tuple[str, ...]]] = {
    "num_kv_heads": ("num_heads",),
    "head_dim": ("hidden_size", "num_heads"),
    "ffn_hidden_size": ("hidden_size",),
}


class TransformerConfig(BaseModel):
    """The shape of a decoder-only transformer; pre-norm, with a final norm and an output projection to the vocabulary.

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
    vocab_size: Count = Field(description="Tokens the model knows, before padding to a multiple of tp.")
    max_seq_len: Count = Field(description="Longest sequence in tokens; the rows of learned positions.")
    position: Position = Field(default="rotary", description="How positions enter: a learned table, or rotation of queries and keys.")
    rotary_base: Positive = Field(default=10000.0, description="Base of the rotary frequencies (RoFormer, section 3.4.2).")
    norm: Norm = Field(default="rmsnorm", description="Normalization in front of every block and of the output.")
    norm_eps: Positive = Field(default=1e-5, description="Added to the variance or mean square inside the norm.")
    activation: Activation = Field(default="swiglu", description="Feed-forward nonlinearity; swiglu and geglu have a third, gating matrix.")
    bias: bool = Field(default=False, description="Whether every linear layer and LayerNorm has a bias (GPT-2 yes, LLaMA no).")
    tie_embeddings: bool = Field(default=False, description="Whether the output projection shares the token embedding's weights.")
    embedding_dropout: Dropout = Field(default=0.0, description="Dropout probability after the embeddings.")
    hidden_dropout: Dropout = Field(default=0.0, description="Dropout probability on each block's output, before the residual sum.")
    attention_dropout: Dropout = Field(default=0.0, description="Dropout probability on the attention weights.")
    init_std: Positive = Field(default=0.02, description="Standard deviation of the initial weights.")
    depth_scaled_init: bool = Field(
        default=True, description="Whether output projections start with init_std / sqrt(2 * num_layers) (GPT-2 paper, section 2.3)."
    )

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

    def num_parameters(self) -> int:
        """Return the exact number of trainable numbers, without vocabulary padding; tied weights count once."""
        embedding = self.vocab_size * self.hidden_size
        positions = self.max_seq_len * self.hidden_size if self.position == "learned" else 0
        norms = (2 * self.num_layers + 1) * self._norm_parameters()
        head = 0 if self.tie_embeddings else embedding
        return embedding + positions + norms + self.num_layers * (self._layer_matrix_parameters() + self._layer_biases()) + head

    def flops_per_token(self, seq_len: int) -> float:
        """Return the matrix-multiplication FLOPs of training on one token, forward and backward.

        6 FLOPs per matrix parameter (one multiply-add forward, two backward) plus the attention scores and their product
        with the values, 12 * layers * heads * head_dim * seq_len; the causal half is not taken off. PaLM paper, appendix B;
        the same count as Megatron-LM (Narayanan et al. 2021, section 5.1) without its recomputed forward.

        Args:
            seq_len: tokens of one sequence.
        """
        return 3.0 * (self.num_layers * self.layer_forward_flops(seq_len) + self.head_forward_flops())

    def layer_forward_flops(self, seq_len: int) -> float:
        """Return the forward matrix-multiplication FLOPs of one layer for one token at `seq_len` tokens; the causal half is not taken off."""
        return 2.0 * self._layer_matrix_parameters() + 4.0 * self.num_heads * self.head_dim * seq_len

    def head_forward_flops(self) -> float:
        """Return the forward FLOPs of the output projection for one token."""
        return 2.0 * self.vocab_size * self.hidden_size

    def padded_vocab_size(self, tp: int) -> int:
        """Return vocab_size rounded up to a multiple of tp, so that every tp rank holds the same number of rows."""
        return math.ceil(self.vocab_size / tp) * tp

    def _layer_matrix_parameters(self) -> int:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (queries + 2 * keys) + queries * self.hidden_size
        matrices = 3 if self.is_gated else 2
        return attention + matrices * self.hidden_size * self.ffn_hidden_size

    def _layer_biases(self) -> int:
        if not self.bias:
            return 0
        attention = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.hidden_size
        into_ffn = 2 if self.is_gated else 1
        return attention + into_ffn * self.ffn_hidden_size + self.hidden_size

    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" and self.bias else 1)


def _kv_heads_divide_heads(config: TransformerConfig) -> Iterator[FieldError]:
    if config.num_heads % config.num_kv_heads:
        valid = one_of(nearest_divisors(config.num_heads, config.num_kv_heads))
        rule = f"num_heads ({config.num_heads}) must be divisible by num_kv_heads ({config.num_kv_heads})"
        yield FieldError("num_kv_heads", rule, config.num_kv_heads, f"set num_kv_heads to {valid}")


def _heads_fill_hidden_size(config: TransformerConfig) -> Iterator[FieldError]:
    if "head_dim" not in config.model_fields_set and config.hidden_size % config.num_heads:
        sizes = one_of(nearest_multiples(config.num_heads, config.hidden_size))
        heads = one_of(nearest_divisors(config.hidden_size, config.num_heads))
        rule = f"hidden_size ({config.hidden_size}) must be divisible by num_heads ({config.num_heads}) when head_dim is not given"
        yield FieldError("hidden_size", rule, config.hidden_size, f"set hidden_size to {sizes}, or num_heads to {heads}, or give head_dim")


def _rotary_pairs_up(config: TransformerConfig) -> Iterator[FieldError]:
    if config.position == "rotary" and config.head_dim % 2:
        sizes = one_of(size for size in (config.head_dim - 1, config.head_dim + 1) if size > 0)
        rule = f"head_dim ({config.head_dim}) must be even, because rotary positions turn pairs of numbers"
        yield FieldError("head_dim", rule, config.head_dim, f"set head_dim to {sizes}, or position to learned")


ShapeRule = Callable[[TransformerConfig], Iterator[FieldError]]
SHAPE_RULES: Final[tuple[ShapeRule, ...]] = (_kv_heads_divide_heads, _heads_fill_hidden_size, _rotary_pairs_up)
