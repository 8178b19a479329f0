"""Rotary positions against multiplication by complex numbers, and the property they exist for."""

import pytest
import torch
from torch import Tensor

from trimaran.kernels.rotary import rotary, rotary_tables

CPU = torch.device("cpu")


def tables(seq: int, head_dim: int, dtype: torch.dtype = torch.float64, first: int = 0, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    return rotary_tables(first, seq, head_dim, base, dtype, CPU)


def heads(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype).requires_grad_()


def complex_reference(x: Tensor, first: int = 0, base: float = 10000.0) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) as complex numbers times e^(i p base^(-2i/d)), in float64."""
    seq, half = x.shape[1], x.shape[-1] // 2
    positions = torch.arange(first, first + seq, dtype=torch.float64)
    angles = positions[:, None] * torch.tensor([base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 9, 3, 10), (3, 5, 1, 64), (0, 4, 2, 4), (2, 0, 2, 4)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_and_its_gradient_equal_complex_multiplication(shape: tuple[int, ...], base: float) -> None:
    x = heads(*shape)
    out, expected = rotary(x, *tables(shape[1], shape[3], base=base)), complex_reference(x, base=base)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, x, dy) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    cos, sin = tables(3, 6)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (heads(2, 3, 2, 6),))


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    q, k = heads(1, 1, 1, 16).expand(1, 40, 1, 16), heads(1, 1, 2, 16)[:, :, 1:].expand(1, 40, 1, 16)
    cos, sin = tables(40, 16)
    scores = rotary(q, cos, sin)[0, :, 0] @ rotary(k, cos, sin)[0, :, 0].T
    for distance in (-7, 0, 1, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert (scores[0, 0] - scores[0, 9]).abs() > 1e-3


def test_tables_from_a_later_position_are_the_rows_of_the_whole() -> None:
    for part, whole in zip(tables(5, 8, first=11), tables(16, 8), strict=True):
        assert part.equal(whole[11:])


def test_tables_of_far_positions_are_right_to_the_last_bit_of_float32() -> None:
    cos, _ = tables(1, 128, torch.float32, first=1_000_000)
    assert cos.equal(tables(1, 128, torch.float64, first=1_000_000)[0].float())
    assert cos[0, 0] == pytest.approx(0.93675212753, abs=1e-7)  # cos(1e6)


def test_non_contiguous_input_and_gradient() -> None:
    x = heads(2, 4, 6, 24)
    cos, sin = tables(4, 8)
    for strided in (x[..., 8:16], x.transpose(0, 1)[:, :, :, ::3].transpose(0, 1)):
        assert not strided.is_contiguous()
        dy = torch.ones((), dtype=torch.float64).expand_as(strided)
        torch.testing.assert_close(rotary(strided, cos, sin), complex_reference(strided), rtol=0, atol=1e-12)
        got = torch.autograd.grad(rotary(strided, cos, sin), x, dy)
        torch.testing.assert_close(got, torch.autograd.grad(complex_reference(strided), x, dy), rtol=0, atol=1e-12)


def test_rotary_leaves_its_input_alone() -> None:
    x = heads(1, 4, 1, 8)
    before = x.detach().clone()
    rotary(x, *tables(4, 8)).sum().backward()
    assert x.detach().equal(before)


def test_bfloat16_stays_near_the_float64_rotation() -> None:
    x = heads(2, 50, 2, 32, dtype=torch.bfloat16)
    out = rotary(x, *tables(50, 32, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), complex_reference(x.double()), rtol=0, atol=0.05)
