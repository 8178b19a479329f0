"""The rotary kernels in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covering_array, label
from trimaran.kernels.rotary import rotary, rotary_, rotary_tables, triton_rotary, triton_rotary_

SHAPES = [(1, 1, 1, 2), (2, 3, 3, 10), (1, 2, 40, 4), (2, 5, 2, 34), (0, 2, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)]
BOTH_FORMS = pytest.mark.parametrize("interleaved", [False, True])


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def tables(rot: int, *positions: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles = torch.randn(*positions, rot // 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def in_place(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` on a copy, since a leaf can't be changed in place."""
    return lambda x, *args: op(x.clone(memory_format=torch.preserve_format), *args)


def hold(shape: tuple[int, ...], rot: int, case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    """Hold the kernel that the case names against its reference, on heads of that shape of which `rot` are rotated."""
    ops = (in_place(triton_rotary_), in_place(rotary_)) if case["in_place"] else (triton_rotary, rotary)
    kernel, reference = (lambda *tensors, op=op: op(*tensors, case["interleaved"]) for op in ops)
    equals_reference(kernel, reference, [heads(*shape), *tables(rot, shape[1])], case["dtype"])


FORMS = {"interleaved": [False, True], "in_place": [False, True]}
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("case", covering_array({"shape": SHAPES, "dtype": DTYPES, **FORMS}), ids=label)
def test_equals_the_reference(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    hold(case["shape"], case["shape"][3], case, equals_reference)


@pytest.mark.parametrize("case", covering_array({"rot": [2, 6, 16, 20], "dtype": DTYPES[:1], **FORMS}), ids=label)
def test_partial_rotation(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    hold((2, 3, 2, 23), case["rot"], case, equals_reference)


@BOTH_FORMS
def test_every_sample_with_positions_of_its_own(interleaved: bool, equals_reference: Callable[..., None]) -> None:
    inputs = [heads(3, 5, 2, 12), *tables(8, 3, 5)]
    equals_reference(
        lambda *t: triton_rotary(*t, interleaved), lambda *t: rotary(*t, interleaved), inputs, torch.float32
    )


@BOTH_FORMS
def test_float32_tables_for_float16(interleaved: bool, equals_reference: Callable[..., None]) -> None:
    cos, sin = rotary_tables(1000, 5, 12, 10000.0, torch.float32, torch.device("cpu"))
    equals_reference(
        lambda x: triton_rotary(x, cos, sin, interleaved),
        lambda x: rotary(x, cos, sin, interleaved),
        [heads(2, 5, 2, 12)],
        torch.float16,
    )


@BOTH_FORMS
def test_any_strides_of_input_gradient_and_tables(interleaved: bool, equals_reference: Callable[..., None]) -> None:
    def strided(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, cos, sin: op(x.permute(2, 0, 3, 1)[..., ::2], cos.T, sin.T, interleaved).permute(1, 3, 0, 2)

    cos, sin = tables(14, 4)
    inputs = [heads(4, 14, 3, 5)[:, :, :, :3].detach().requires_grad_(), cos.T.contiguous()[:3], sin.T.contiguous()[:3]]
    equals_reference(strided(triton_rotary), strided(rotary), inputs, torch.float32)
    equals_reference(strided(lambda x, *t: in_place(triton_rotary_)(x, *t)), strided(rotary), inputs, torch.float32)


@BOTH_FORMS
def test_in_place_on_a_part_of_a_projection_leaves_the_rest(
    interleaved: bool, equals_reference: Callable[..., None]
) -> None:
    def keys_in_place(kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kv = kv * 1.0
        triton_rotary_(kv.narrow(-1, 0, 16).unflatten(-1, (2, 8)), cos, sin, interleaved)
        return kv

    def keys(kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        return torch.cat((rotary(k.unflatten(-1, (2, 8)), cos, sin, interleaved).flatten(-2), v), dim=-1)

    equals_reference(keys_in_place, keys, [heads(2, 3, 32), *tables(8, 3)], torch.float32)


def test_in_place_changes_and_returns_the_input() -> None:
    x, (cos, sin) = heads(1, 4, 3, 8).detach().float(), tables(8, 4, dtype=torch.float32)
    expected = rotary(x, cos, sin)
    assert triton_rotary_(x, cos, sin) is x
    torch.testing.assert_close(x, expected)
