"""LayerNorm and RMSNorm, alone and after a residual sum, against their definitions in float64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimaran.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

SHAPES = [(5,), (1, 1), (3, 7), (2, 5, 16), (2, 3, 4, 33), (0, 8), (2, 0, 8)]


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
    torch.testing.assert_close(
        layer_norm(x, weight, chosen, 1e-5), layer_reference(x, weight, chosen, 1e-5), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradcheck(eps: float) -> None:
    x, weight, bias = inputs((2, 3, 5))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, eps), (x, weight, bias))


@pytest.mark.parametrize(
    "view", [lambda t: t.permute(2, 1, 0), lambda t: t[::2], lambda t: t[..., ::2], lambda t: t.permute(1, 2, 0)]
)
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


def add_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = inputs(shape, dtype)
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return x, residual.to(dtype).requires_grad_(), weight, bias


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_and_its_gradients_equal_the_definition(shape: tuple[int, ...]) -> None:
    x, residual, weight, _ = add_inputs(shape)
    out, expected = add_rms_norm(x, residual, weight, 1e-5), (x + residual, rms_reference(x + residual, weight, 1e-5))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    for used in ([0, 1], [0], [1]):  # either output may be left unused
        found, wanted = (
            torch.autograd.grad(
                [y[i] for i in used],
                (x, residual, weight),
                [grads[i] for i in used],
                retain_graph=True,
                allow_unused=True,
            )
            for y in (out, expected)
        )
        torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-11, atol=1e-11)
        assert (found[2] is None) == (wanted[2] is None)
        if found[2] is not None:
            torch.testing.assert_close(found[2], wanted[2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_equals_the_definition(shape: tuple[int, ...], with_bias: bool) -> None:
    x, residual, weight, bias = add_inputs(shape)
    chosen = bias if with_bias else None
    expected = (x + residual, layer_reference(x + residual, weight, chosen, 1e-5))
    torch.testing.assert_close(add_layer_norm(x, residual, weight, chosen, 1e-5), expected, rtol=1e-11, atol=1e-11)


def test_gradcheck_of_the_add_forms() -> None:
    x, residual, weight, bias = add_inputs((2, 3, 5))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5), (x, residual, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_add_forms_give_the_bits_of_the_sum_and_of_its_norm(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (t.detach() for t in add_inputs((7, 33), dtype))
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))
    total, normed = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, layer_norm(total, weight, bias, 1e-5))


def test_add_rms_norm_of_non_contiguous_inputs_and_gradients() -> None:
    x, residual, weight, _ = add_inputs((6, 6, 6))
    strided = (x.permute(2, 1, 0), residual.permute(1, 2, 0), weight)
    grads = (torch.ones((), dtype=torch.float64).expand(6, 6, 6), x.detach().cos().permute(1, 0, 2))
    found = torch.autograd.grad(add_rms_norm(*strided, 1e-5), (x, residual, weight), grads)
    total = strided[0] + strided[1]
    expected = torch.autograd.grad((total, rms_reference(total, weight, 1e-5)), (x, residual, weight), grads)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_add_forms_keep_the_dtype_of_x_beside_float32_weights_and_residual() -> None:
    x = inputs((4, 8), torch.bfloat16)[0]
    _, residual, weight, bias = add_inputs((4, 8), torch.float32)
    for outputs in (add_rms_norm(x, residual, weight, 1e-5), add_layer_norm(x, residual, weight, bias, 1e-5)):
        assert [y.dtype for y in outputs] == [torch.bfloat16] * 2
        grads = torch.autograd.grad([y.float().sum() for y in outputs], (x, residual, weight))
        assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_gradients_of_x_and_residual_do_not_share_memory() -> None:
    x, residual, weight, _ = add_inputs((4, 8))
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    (total.sum() + normed.sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    x.grad.zero_()
    assert residual.grad.any()


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_x_and_residual_of_two_shapes_are_refused(norm: str) -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x and residual must have one shape; they have \(2, 4\) and \(1, 4\)"):
        _ = add_rms_norm(x, x[:1], weight, 1e-5) if norm == "rms" else add_layer_norm(x, x[:1], weight, None, 1e-5)
