"""The optimizer and lr_schedule sections: the update rule, and its learning rate over the steps."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import Count, NonNegative, NonNegativeWhole, Positive
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, Fraction, PositiveFraction
from trimaran.runtime.train.lr_schedule import LrScheduleName

Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


class OptimizerSection(BaseModel):
    """AdamW (Loshchilov and Hutter 2019) and gradient clipping."""

    model_config = SECTION_CONFIG

    name: Literal["adamw"] = Field(default="adamw", description="Update rule.")
    lr: Positive = Field(description="Peak learning rate.")
    betas: Betas = Field(
        default=[0.9, 0.95], description="Decays of the running means of the gradient and of the squared gradient."
    )
    eps: Positive = Field(default=1e-8, description="Added to the root of the second moment.")
    weight_decay: NonNegative = Field(
        default=0.1, description="Decoupled weight decay of matrices; biases and norms have none."
    )
    max_grad_norm: NonNegative = Field(default=1.0, description="Global gradient norm to clip to; 0 does not clip.")


class LrScheduleSection(BaseModel):
    """The learning rate over the steps: a linear warmup, then one of six shapes."""

    model_config = SECTION_CONFIG

    name: LrScheduleName = Field(default="cosine", description="Shape after the warmup; wsd is warmup, stable, decay.")
    warmup_steps: NonNegativeWhole = Field(default=0, description="Steps of linear warmup.")
    min_lr_ratio: Fraction = Field(default=0.1, description="Lowest learning rate, as a share of optimizer.lr.")
    decay_steps: Count | None = Field(
        default=None,
        description="Step at which cosine, linear or wsd reach the lowest rate, warmup included (null: "
        "train.num_steps).",
    )
    step_interval: Count | None = Field(default=None, description="step: steps between two drops.")
    step_gamma: PositiveFraction = Field(default=0.1, description="step: factor of every drop.")
    decay_rate: PositiveFraction | None = Field(default=None, description="exponential: factor of every step.")
    wsd_decay_fraction: PositiveFraction = Field(
        default=0.2, description="wsd: share of decay_steps that the final decay takes."
    )
