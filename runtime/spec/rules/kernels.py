"""Rules of what Triton's kernels can compute."""

from collections.abc import Iterator
from typing import Final

from trimaran.kernels.limits import LARGEST_HEAD_DIM, TRITON_DTYPES
from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


# What only the machine can say (no GPU, too old a GPU) is refused where the kernels are chosen: kernels/dispatch.py.
_OTHER_BACKEND: Final = "set kernels.backend to auto or torch"


@RULES.needs("kernels.backend", "precision.dtype")
def _triton_has_the_dtype(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    dtype = spec.precision.dtype
    if spec.kernels.backend == "triton" and dtype not in TRITON_DTYPES:
        rule = f"triton has no {dtype} kernels, and precision.dtype is {dtype}"
        yield FieldError("kernels.backend", rule, "triton", _OTHER_BACKEND)


@RULES.needs("kernels.backend", "launcher.device")
def _triton_has_a_gpu(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.kernels.backend == "triton" and spec.launcher.device == "cpu":
        rule = "triton needs a GPU, and launcher.device is cpu"
        yield FieldError("kernels.backend", rule, "triton", _OTHER_BACKEND)


@RULES.needs("kernels.backend", "model.head_dim")
def _triton_takes_the_heads(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.kernels.backend == "triton" and shape.head_dim > LARGEST_HEAD_DIM:
        rule = f"triton attention takes a head_dim of at most {LARGEST_HEAD_DIM}, got {shape.head_dim}"
        yield FieldError("kernels.backend", rule, "triton", f"{_OTHER_BACKEND}, or give the model narrower heads")
