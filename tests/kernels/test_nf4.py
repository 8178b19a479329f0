"""NormalFloat4: the codes, scales and numbers of bitsandbytes, which needs not be there; zeros, ties, short blocks."""

import hashlib

import pytest
import torch
from torch import Tensor

from trimaran.kernels.nf4 import BLOCK, dequantize, quantize

# Made by bitsandbytes 0.50.2's quantize_4bit(numbers().view(3, 50), blocksize=64, quant_type="nf4") on a CPU.
CODES = (
    "56b76948e3836c17b39f6926d57d3aa6b16948e3835c17b39f6926d57c3aa6a16948e2835c07"
    "b39f6915d57d2aa5a16948e2835c07b39f6915d57c2aa5a15948e28c5c07b38f6915d57d2a"
)
ABSMAX = [3.671875, 3.515625, 3.359375]
# Of the numbers below, the codes and scales that bitsandbytes 0.50.2's quantize_4bit gives them on a CPU, and what its
# dequantize_4bit makes of those; as float32, but the codes.
DIGESTS = {
    "float32": "a2b7f1dabcaf8bd09b503566f446adf4ae196120a71f6a4dd7c37718d7889de9",
    "bfloat16": "7f05fd3e199fb068cea34587308f447c37d79707b7373659b7c821712c014e21",
    "float16": "6d6e493d2b6f58d22eec3dc4e5ae7f037d682c60aa02e906893a645b770e25c9",
}


def numbers() -> Tensor:
    """150 float32 of both signs, exact in every library, two blocks and a shorter one, with a zero."""
    index = torch.arange(150)
    x = ((index * 37 % 101) - 50).float() * (1 + index % 5) / 64
    x[3] = 0
    return x


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    codes, absmax = quantize(numbers().view(3, 50))
    assert bytes(codes.tolist()).hex() == CODES
    assert absmax.tolist() == ABSMAX
    assert absmax.dtype == torch.float32


@pytest.mark.parametrize("dtype", DIGESTS)
def test_random_matrices_have_the_bits_of_bitsandbytes(dtype: str) -> None:
    digest = hashlib.sha256()
    for number, shape in enumerate([(4, 128), (3, 50), (5, 13), (1, 1), (7, 64)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(getattr(torch, dtype))
        codes, absmax = quantize(x)
        for tensor in (x, codes, absmax, dequantize(codes, absmax, shape, x.dtype)):
            wide = tensor if tensor.dtype == torch.uint8 else tensor.float()
            digest.update(wide.contiguous().numpy().tobytes())
    assert digest.hexdigest() == DIGESTS[dtype]


def test_levels_come_back_exactly_and_a_tie_falls_to_the_lower_one() -> None:
    levels = dequantize(torch.arange(0, 256, 17, dtype=torch.uint8), torch.ones(1), (32,), torch.float32)[::2]
    assert levels[0] == -1.0
    assert levels[7] == 0.0
    assert levels[15] == 1.0
    assert bool((levels.diff() > 0).all())
    ties = (levels[:-1] + levels[1:]) / 2
    codes, absmax = quantize(torch.cat((levels, ties, torch.zeros(BLOCK - 31))))
    found = dequantize(codes, absmax, (BLOCK,), torch.float32)
    assert torch.equal(found[:16], levels)
    assert torch.equal(found[16:31], levels[:-1])


def test_an_error_is_at_most_half_the_widest_gap_of_the_block() -> None:
    x = numbers()
    codes, absmax = quantize(x)
    found = dequantize(codes, absmax, (150,), torch.float32)
    bound = 0.31 / 2 * absmax.repeat_interleave(BLOCK)[:150]  # the levels below -0.69 are the furthest apart
    assert bool(((found - x).abs() <= bound).all())
    assert float((found - x).abs().max()) > 0


def test_a_block_of_zeros_stays_zero() -> None:
    codes, absmax = quantize(torch.zeros(2, BLOCK))
    assert bool((dequantize(codes, absmax, (2, BLOCK), torch.bfloat16) == 0).all())
