"""Weights in the order in which oneDNN multiplies few rows by them, for generation in float32 on a CPU.

A product of 2 to 16 rows reads the weight once, as that of one row does, and packing it anew at each call costs more
than the product: on an AVX-512 core 8 rows by a packed head [49152, 576] take 9 ms in place of 20. The copy takes as
much memory as the weight.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_PACKED: Final = "trimaran_packed"  # attribute of a weight
_ROWS: Final = 8  # for which oneDNN chooses the order; it is good for all from 2 to hundreds


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
    rows = weight.detach().view(-1, weight.shape[-1])
    try:
        copy = torch.ops.mkldnn._reorder_linear_weight(rows, _ROWS)
    except (AttributeError, RuntimeError):  # another release of torch may call it otherwise
        return False
    setattr(weight, _PACKED, _Packed(copy, weight._version))
    return True


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return x W^T + b by the packed copy of a weight; None where it has none, or another product is as fast.

    Args:
        x: [..., in]; no gradient flows.
        bias: of the shape of the weight without its last dim.
    """
    packed: _Packed | None = getattr(weight, _PACKED, None)
    if packed is None or packed.version != weight._version or x.numel() == x.shape[-1]:
        return None
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, packed.copy, None if bias is None else bias.detach().flatten(), "none", [], ""
    )
    return found
