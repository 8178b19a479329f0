"""LayerNorm and RMSNorm against their definitions in float64, and the hand-written backward of RMSNorm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimaran.kernels.norm import layer_norm, rms_norm

SHAPES = [(1, 1), (3, 7), (2, 5, 16), (2, 3, 4, 33), (0, 8), (2, 0, 8)]


def rms_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = (torch.randn(shape[-1], generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_its_gradients_equal_the_definition(shape: tuple[int, ...]) -> None:
    x, weight, _ = inputs(shape)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out, expected = rms_norm(x, weight, 1e-5), rms_reference(x, weight, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(y, (x, weight), dy) for y in (out, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_equals_the_definition(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = inputs(shape)
    chosen = bias if with_bias else None
    torch.testing.assert_close(layer_norm(x, weight, chosen, 1e-5), layer_reference(x, weight, chosen, 1e-5), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradcheck(eps: float) -> None:
    x, weight, bias = inputs((2, 3, 5))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, eps), (x, weight, bias))


@pytest.mark.parametrize("view", [lambda t: t.permute(2, 1, 0), lambda t: t[::2], lambda t: t[..., ::2], lambda t: t.permute(1, 2, 0)])
def test_non_contiguous_input_and_gradient_give_what_contiguous_ones_give(view: Callable[[Tensor], Tensor]) -> None:
    x = inputs((6, 6, 6))[0]
    strided = view(x)
    assert not strided.is_contiguous()
    weight = inputs((strided.shape[-1],))[1]
    for dy in (torch.ones((), dtype=torch.float64).expand_as(strided), view(x.detach().cos())):
        got = torch.autograd.grad(rms_norm(strided, weight, 1e-5), (x, weight), dy)
        expected = torch.autograd.grad(rms_reference(strided, weight, 1e-5), (x, weight), dy)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bfloat16_keeps_its_statistics_in_float32(norm: str) -> None:
    x, weight, bias = inputs((64, 1000), torch.bfloat16)
    out = rms_norm(x, weight, 1e-5) if norm == "rms" else layer_norm(x, weight, bias, 1e-5)
    assert out.dtype == torch.bfloat16
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = rms_reference(wide[0], wide[1], 1e-5) if norm == "rms" else layer_reference(*wide, 1e-5)
    # Two roundings to 8 bits; statistics in bfloat16 would be off by some 2**-8 a term.
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    got = torch.autograd.grad(out, (x, weight), dy)
    for grad, wanted in zip(got, torch.autograd.grad(expected, wide[:2], dy.double()), strict=True):
        assert grad.dtype == torch.bfloat16
        # Our sums over rows are float32; torch's LayerNorm adds them up in bfloat16 and is twice as far off.
        assert (grad.double() - wanted).norm() < (5e-3 if norm == "rms" else 2e-2) * wanted.norm()


def test_large_values_do_not_overflow_the_sum_of_squares_in_float32() -> None:
    x = torch.full((1, 64), 1e18)  # squares sum to 6e37, the mean is 1e36: both within float32
    torch.testing.assert_close(rms_norm(x, torch.ones(64), 1e-5), torch.ones(1, 64))


def test_a_row_of_zeros_gives_zeros_and_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-6)
    assert not out.any()
    (grad,) = torch.autograd.grad(out, x, torch.ones(2, 8))
    torch.testing.assert_close(grad, torch.full((2, 8), 1e3))
