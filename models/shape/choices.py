"""The values that fields of TransformerConfig can have, and the formulas of derived defaults. No torch."""

import math
from typing import Annotated, Final, Literal, Self

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
ScoreHeadKind = Literal["none", "only", "beside"]
GATED_ACTIVATIONS: Final = ("swiglu", "geglu", "geglu_tanh")


class RotaryScaling(BaseModel):
    """How rotary frequencies are stretched to longer contexts; kernels/rotary.py has the formulas by the same names."""

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
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"rotary_scaling's low_freq_factor ({low}) must be below its high_freq_factor ({high})")
        return self


def default_residual_scale(init: str, num_layers: int) -> float:
    """DeepNorm's alpha of a decoder (Wang et al. 2022, table 1)."""
    return float((2 * num_layers) ** 0.25) if init == "deepnorm" else 1.0


def default_attention_scale(init: str, mup_base_head_dim: int, head_dim: int) -> float | None:
    """Under muP 1 / head_dim, times what makes it head_dim ** -0.5 at the base (Yang et al. 2022, definition 4.1)."""
    # A head_dim of 0 follows from fewer numbers than heads, which a rule reports.
    return float(math.sqrt(mup_base_head_dim) / max(head_dim, 1)) if init == "mup" else None


def default_logits_scale(init: str, mup_base_width: int | None, hidden_size: int) -> float:
    """Under muP base width / width (Yang et al. 2022, table 8, output weights)."""
    return 1.0 if init != "mup" or mup_base_width is None else float(mup_base_width / hidden_size)
