"""Rotary positions against multiplication by complex numbers, and the property they exist for."""

import pytest
import torch
from torch import Tensor

from trimaran.kernels.rotary import rotary, rotary_, rotary_tables

CPU = torch.device("cpu")


def tables(
    seq: int, head_dim: int, dtype: torch.dtype = torch.float64, first: int = 0, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    return rotary_tables(first, seq, head_dim, base, dtype, CPU)


def heads(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype).requires_grad_()
    )


def complex_reference(
    x: Tensor, base: float = 10000.0, interleaved: bool = False, positions: Tensor | None = None
) -> Tensor:
    """Pairs (x_i, x_{i + d/2}), or (x_2i, x_{2i+1}), as complex numbers times e^(i p base^(-2i/d)), in float64."""
    seq, half = x.shape[1], x.shape[-1] // 2
    positions = torch.arange(seq, dtype=torch.float64)[None] if positions is None else positions.double()
    angles = positions[..., None] * torch.tensor(
        [base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64
    )
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, :, None, :]
    return (
        torch.stack((turned.real, turned.imag), dim=-1).flatten(-2)
        if interleaved
        else torch.cat((turned.real, turned.imag), dim=-1)
    )


def assert_same_with_gradient(out: Tensor, expected: Tensor, x: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, x, dy.to(y.dtype), retain_graph=True) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


BOTH_FORMS = pytest.mark.parametrize("interleaved", [False, True])


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 9, 3, 10), (3, 5, 1, 64), (0, 4, 2, 4), (2, 0, 2, 4)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_and_its_gradient_equal_complex_multiplication(
    shape: tuple[int, ...], base: float, interleaved: bool
) -> None:
    x = heads(*shape)
    cos_sin = tables(shape[1], shape[3], base=base)
    expected = complex_reference(x, base, interleaved)
    assert_same_with_gradient(rotary(x, *cos_sin, interleaved), expected, x)
    assert_same_with_gradient(rotary_(x * 1.0, *cos_sin, interleaved), expected, x)


@BOTH_FORMS
def test_gradcheck(interleaved: bool) -> None:
    cos, sin = tables(3, 6)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin, interleaved), (heads(2, 3, 2, 6),))
    assert torch.autograd.gradcheck(
        lambda x: rotary_(x.clone(), cos[:, :2], sin[:, :2], interleaved), (heads(2, 3, 2, 6),)
    )


@BOTH_FORMS
@pytest.mark.parametrize("rot", [2, 6, 8])
def test_a_partial_rotation_turns_the_first_numbers_and_leaves_the_rest(rot: int, interleaved: bool) -> None:
    x = heads(2, 4, 3, 9)
    expected = torch.cat((complex_reference(x[..., :rot], interleaved=interleaved), x[..., rot:]), dim=-1)
    assert_same_with_gradient(rotary(x, *tables(4, rot), interleaved), expected, x)
    assert_same_with_gradient(rotary_(x * 1.0, *tables(4, rot), interleaved), expected, x)


@BOTH_FORMS
def test_every_sample_may_have_positions_of_its_own(interleaved: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 0, 1, 2]])  # packed documents, and a part of one
    x, (cos, sin) = heads(2, 5, 3, 8), tables(9, 8)
    expected = complex_reference(x, interleaved=interleaved, positions=positions)
    assert_same_with_gradient(rotary(x, cos[positions], sin[positions], interleaved), expected, x)


def test_in_place_on_views_of_a_projection() -> None:
    hidden, weight = heads(2, 4, 6), heads(48, 6)
    cos, sin = tables(4, 8)

    def project(turn: object) -> Tensor:
        q = (hidden @ weight.T).unflatten(-1, (6, 8))
        return turn(q, cos, sin)  # type: ignore[operator, no-any-return]

    assert_same_with_gradient(project(rotary_), project(rotary), weight)

    qkv = hidden @ weight.T
    expected = torch.cat((rotary(qkv[..., :16].unflatten(-1, (2, 8)), cos, sin).flatten(-2), qkv[..., 16:]), dim=-1)
    changed = hidden @ weight.T
    rotary_(changed[..., :16].unflatten(-1, (2, 8)), cos, sin)  # basic indexing and narrow give a single view: allowed
    assert_same_with_gradient(changed, expected, weight)


def test_in_place_on_one_of_several_views_is_refused_by_autograd() -> None:
    part, _ = (heads(1, 4, 2, 16) * 1.0).chunk(2, dim=-1)
    with pytest.raises(RuntimeError, match="multiple views"):
        rotary_(part, *tables(4, 8))


def test_in_place_leaves_the_gradient_that_comes_in_alone() -> None:
    x = heads(1, 4, 1, 8)
    dy = torch.ones(1, 4, 1, 8, dtype=torch.float64)
    torch.autograd.grad(rotary_(x * 1.0, *tables(4, 8)), x, dy)
    assert dy.equal(torch.ones_like(dy))


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tables_for_a_lower_precision(dtype: torch.dtype, interleaved: bool) -> None:
    x = heads(2, 50, 2, 32).detach().to(dtype)
    out = rotary(x, *tables(50, 32, torch.float32), interleaved)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, complex_reference(x.double(), interleaved=interleaved).to(dtype), rtol=2**-7, atol=1e-6
    )


def test_interleaved_at_an_odd_place_in_memory() -> None:
    memory = torch.randn(2 * 5 * 3 * 9 + 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for x in (
        memory[1:].view(2, 5, 3, 9)[..., :8],
        memory[:270].view(2, 5, 3, 9)[..., 1:],
        memory[1:10].view(1, 1, 1, 9)[..., :8],
    ):
        expected = complex_reference(x, interleaved=True)
        torch.testing.assert_close(rotary(x, *tables(x.shape[1], 8), True), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "table", "message"),
    [
        ((2, 3, 1, 8), (4, 4), r"cos and sin must be \[3, rot / 2\] or \[2, 3, rot / 2\]"),
        ((2, 3, 1, 8), (1, 3, 4), r"cos and sin must be"),
        ((2, 3, 1, 8), (3, 5), "cos has 5 pairs, which must be at least 1 and fit into a head of 8"),
        ((2, 3, 1, 8), (3, 0), "cos has 0 pairs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], table: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(shape), torch.zeros(table), torch.zeros(table))


def test_expanded_memory_is_not_rotated_in_place() -> None:
    with pytest.raises(ValueError, match="several times"):
        rotary_(torch.zeros(1, 3, 1, 8).expand(2, 3, 1, 8), *tables(3, 8, torch.float32))


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
