"""What the fields of TransformerConfig can be, and what stands in for those that are not given. No torch."""

import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimaran.models.fields import Count, Positive

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
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        description="How many times longer the context becomes."
    )
    original_max_position: Count | None = Field(
        default=None, description="dynamic_ntk, yarn, llama3: length the model was trained at."
    )
    low_freq_factor: Positive = Field(
        default=1.0, description="llama3: longer wavelengths than original length / this are interpolated."
    )
    high_freq_factor: Positive = Field(
        default=4.0, description="llama3: shorter wavelengths than original length / this stay."
    )
    beta_fast: Positive = Field(
        default=32.0, description="yarn: pairs that turn more often within the original length stay."
    )
    beta_slow: Positive = Field(default=1.0, description="yarn: pairs that turn less often are interpolated.")
    attention_factor: Positive | None = Field(
        default=None, description="yarn: factor of cos and sin (null: 0.1 ln(factor) + 1)."
    )

    @model_validator(mode="after")
    def _says_all_that_its_kind_needs(self) -> Self:
        if self.kind in ("dynamic_ntk", "yarn", "llama3") and self.original_max_position is None:
            raise ValueError(
                f"rotary_scaling of kind {self.kind} needs original_max_position, the length the model was trained at"
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rotary_scaling's low_freq_factor ({self.low_freq_factor}) must be below its high_freq_factor ({self.high_freq_factor})"
            )
        return self


def default_num_kv_heads(data: dict[str, Any]) -> int:
    """Return `num_kv_heads` where it is not given, from the fields before it."""
    return int(data.get("num_heads", 1))


def default_head_dim(data: dict[str, Any]) -> int:
    """Return `head_dim` where it is not given, from the fields before it."""
    return int(data.get("hidden_size", 1)) // int(data.get("num_heads", 1))


def default_ffn_hidden_size(data: dict[str, Any]) -> int:
    """Return `ffn_hidden_size` where it is not given, from the fields before it."""
    return 4 * int(data.get("hidden_size", 1))


def like_bias(data: dict[str, Any]) -> bool:
    """Return whether `bias` is on."""
    return bool(data.get("bias", False))


def default_residual_scale(data: dict[str, Any]) -> float:
    """DeepNorm's alpha of a decoder (Wang et al. 2022, table 1)."""
    return float((2 * int(data.get("num_layers", 1))) ** 0.25) if data.get("init") == "deepnorm" else 1.0


def default_mup_base_head_dim(data: dict[str, Any]) -> int:
    """Return `mup_base_head_dim` where it is not given, from the fields before it."""
    return int(data.get("head_dim", 1))


def default_attention_scale(data: dict[str, Any]) -> float | None:
    """Under muP 1 / head_dim, times what makes it head_dim ** -0.5 at the base (Yang et al. 2022, definition 4.1)."""
    if data.get("init") != "mup":
        return None
    return float(math.sqrt(data.get("mup_base_head_dim", 1)) / data.get("head_dim", 1))


def default_logits_scale(data: dict[str, Any]) -> float:
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
