"""What the Triton kernels can't do, free of torch, so that a run spec is checked against the same numbers."""

from typing import Final, Literal

Backend = Literal["auto", "triton", "torch"]
LARGEST_HEAD_DIM: Final = 256
TRITON_DTYPES: Final = ("bfloat16", "float16", "float32")
