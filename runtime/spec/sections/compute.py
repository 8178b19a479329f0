"""The precision and kernels sections: number formats, and which implementation computes."""

from typing import Literal

from pydantic import BaseModel, Field

from trimaran.kernels.limits import Backend
from trimaran.runtime.spec.sections.common import SECTION_CONFIG

Dtype = Literal["float32", "bfloat16", "float64"]


class PrecisionSection(BaseModel):
    """Number formats."""

    model_config = SECTION_CONFIG

    dtype: Dtype = Field(
        default="float32",
        description="Format of parameters and compute; bfloat16 keeps float32 main parameters and gradients.",
    )


class KernelsSection(BaseModel):
    """Which implementation of the fused operations computes."""

    model_config = SECTION_CONFIG

    backend: Backend = Field(
        default="auto",
        description="auto takes Triton's kernels on a GPU and torch's elsewhere; triton is an error where they can't "
        "run.",
    )
    deterministic: bool = Field(
        default=True,
        description="Whether Triton's kernels give the same bits every time; false lets attention's backward pass use "
        "atomics.",
    )
