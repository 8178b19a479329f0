"""NormalFloat4: matrices in 4 bits an element (Dettmers et al. 2023, "QLoRA", sections 2 and 3, appendix E).

    block of 64 elements -> absmax (float32), and for each element the nearest of 16 levels to x / absmax
    dequantized:            level * absmax

A block is 64 consecutive elements of the row-major matrix; the last one may be shorter. Codes and absmax have the bits
of bitsandbytes' `quantize_4bit(x, blocksize=64, quant_type="nf4")`, and `dequantize` those of its `dequantize_4bit`:
x times the reciprocal of absmax (a shorter last block: x over absmax) is compared with the means of adjacent levels, a
value on one falls to the lower level, and of two elements in a byte the first has the high bits.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK: Final = 64
_LEAST: Final = 1e-38  # in place of an absmax of 0
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero; bitsandbytes' published values.
_LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes [ceil(n / 2)] uint8, absmax [ceil(n / 64)] float32) of x with n elements, computed in float32."""
    flat = x.reshape(-1).float()
    levels = torch.tensor(_LEVELS, device=x.device)
    whole = len(flat) // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(1)).flatten()
    if len(rest):
        last = rest.abs().max().clamp(min=_LEAST)
        absmax, scaled = torch.cat((absmax, last.unsqueeze(0))), torch.cat((scaled, rest / last))
    scaled = pad(scaled.clamp_(-1, 1), (0, len(scaled) % 2))
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the elements [*shape] of what `quantize` returned; level times absmax is rounded from float32 once."""
    levels = torch.tensor(_LEVELS, device=codes.device)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # of each byte
    elements = pairs.index_select(0, codes.int()).flatten()
    count = torch.Size(shape).numel()
    if len(elements) == len(absmax) * BLOCK:
        return (elements.view(-1, BLOCK) * absmax.unsqueeze(1)).to(dtype).view(shape)
    return (elements[:count] * absmax.repeat_interleave(BLOCK)[:count]).to(dtype).view(shape)
