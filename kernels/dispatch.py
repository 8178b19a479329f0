"""The one place that chooses an implementation of an op: by the tensor's device and by an explicit wish."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trimaran.kernels.attention import attention

Backend = Literal["auto", "torch"]
Attention = Callable[..., Tensor]


def choose_attention(device: torch.device, backend: Backend = "auto") -> Attention:
    """Return the attention function for tensors on `device`; see `kernels.attention.attention` for its arguments.

    torch's scaled_dot_product_attention is the only implementation so far; on a GPU torch picks its own flash kernel.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"kernel backend {backend!r} for {device} is not known; choose 'auto' or 'torch'")
    return attention
