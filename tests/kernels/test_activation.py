"""GELU, its tanh form and SwiGLU against their formulas, and SwiGLU's hand-written backward."""

import math

import pytest
import torch
from torch import Tensor

from trimaran.kernels.activation import gelu, gelu_tanh, swiglu


def gate_up(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3)
        .to(dtype)
        .requires_grad_()
    )


def swiglu_reference(x: Tensor) -> Tensor:
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return gate / (1 + (-gate).exp()) * up


def test_gelu_is_x_times_the_normal_distribution() -> None:
    x = gate_up(5, 7)
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), rtol=1e-12, atol=1e-12)


def test_gelu_tanh_is_the_published_approximation() -> None:
    x = gate_up(5, 7)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu_tanh(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gelu_tanh(x), gelu(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 5, 6), (0, 4), (3, 0)])
def test_swiglu_and_its_gradient_equal_the_formula(shape: tuple[int, ...]) -> None:
    x = gate_up(*shape)
    out, expected = swiglu(x), swiglu_reference(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, x, dy) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_swiglu_leaves_its_input_alone() -> None:
    x = gate_up(4, 6)
    before = x.detach().clone()
    swiglu(x).sum().backward()
    assert x.detach().equal(before)


@pytest.mark.parametrize("function", [gelu, gelu_tanh, swiglu])
def test_gradcheck(function: object) -> None:
    assert torch.autograd.gradcheck(function, (gate_up(2, 3, 6),))


def test_swiglu_of_a_non_contiguous_input_with_a_non_contiguous_gradient() -> None:
    x = gate_up(6, 8, 4)
    for strided in (x.permute(2, 1, 0)[..., :4], x[:, ::2], x.transpose(0, 1)):
        dy = torch.ones((), dtype=torch.float64).expand(*strided.shape[:-1], strided.shape[-1] // 2)
        got = torch.autograd.grad(swiglu(strided), x, dy)
        torch.testing.assert_close(got, torch.autograd.grad(swiglu_reference(strided), x, dy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [gelu, gelu_tanh, swiglu])
def test_bfloat16_is_the_rounded_float64_result(function: object) -> None:
    x = gate_up(50, 60, dtype=torch.bfloat16)
    wide = x.detach().double().requires_grad_()
    out, expected = function(x), function(wide)  # type: ignore[operator]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-6, atol=2**-7)
    got, wanted = torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), wide)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=2**-5, atol=2**-5)


def test_swiglu_of_large_gates_is_finite() -> None:
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    assert out.equal(torch.tensor([[0.0, 3e4]]))
    assert x.grad is not None
    assert x.grad.isfinite().all()
