"""Weights in the order in which oneDNN multiplies by them, for generation and evaluation in float32 on a CPU.

A product of few rows reads the weight once, and packing it anew at each call costs more than the product: on two
AVX-512 cores 1, 16 and 512 rows by a packed head [49152, 576] take 5, 8 and 169 ms in place of 12, 19 and 241. The copy
takes as much memory as the weight.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_PACKED: Final = "trimaran_packed"  # attribute of a weight
_ROWS: Final = 8  # for which oneDNN chooses the order; it is good for all from 1 to thousands


@dataclass(frozen=True, eq=False)
class _Packed:
    """A packed copy, and the version of the weight that it is a copy of."""

    copy: Tensor
    version: int


@torch.no_grad()
def pack(weight: Tensor) -> bool:
    """Keep a packed copy with a weight [out, in], or with a leading dim of parts; return whether there is one.

    There is none unless it is in float32 on a CPU, and where torch lacks oneDNN.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if _is_current(weight):
        return True
    rows = weight.detach().view(-1, weight.shape[-1])
    try:
        copy = torch.ops.mkldnn._reorder_linear_weight(rows, _ROWS)
    except (AttributeError, RuntimeError):  # another release of torch may call it otherwise
        return False
    setattr(weight, _PACKED, _Packed(copy, weight._version))
    return True


def unpack(weight: Tensor) -> None:
    """Drop the packed copy of a weight, where it has one."""
    vars(weight).pop(_PACKED, None)


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x W^T + b by the packed copy of a weight; None where it has none.

    Args:
        x: [..., in]; no gradient flows.
        bias: of the shape of the weight without its last dim.
    """
    if not _is_current(weight):
        return None
    packed: _Packed = getattr(weight, _PACKED)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, packed.copy, None if bias is None else bias.detach().flatten(), "none", [], ""
    )
    return found


def _is_current(weight: Tensor) -> bool:
    """Whether a weight has a packed copy of what it is now."""
    packed: _Packed | None = getattr(weight, _PACKED, None)
    return packed is not None and packed.version == weight._version
