"""GELU, SwiGLU and GeGLU kernels in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.covering import covering_array, label
from trimaran.kernels import activation

SHAPES = [(1, 2), (3, 5, 34), (2, 2, 3, 64), (0, 8), (2, 0, 8)]
PLAIN = ["gelu", "gelu_tanh"]
GATED = ["swiglu", "geglu", "geglu_tanh"]


LEVELS = {"name": [*PLAIN, *GATED], "shape": SHAPES, "dtype": [torch.float32, torch.float16]}


@pytest.mark.parametrize("case", covering_array(LEVELS), ids=label)
def test_equals_the_reference(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    draw = torch.randn(case["shape"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kernel, reference = (getattr(activation, prefix + case["name"]) for prefix in ("triton_", ""))
    equals_reference(kernel, reference, [(draw * 3).requires_grad_()], case["dtype"])


@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_non_contiguous_input_and_gradient(name: str, equals_reference: Callable[..., None]) -> None:
    x = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    kernel, reference = getattr(activation, f"triton_{name}"), getattr(activation, name)
    equals_reference(
        lambda t: kernel(t.transpose(0, 1)).transpose(0, 1),
        lambda t: reference(t.transpose(0, 1)).transpose(0, 1),
        [x],
        torch.float32,
    )


@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_large_values_stay_finite(name: str) -> None:
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], requires_grad=True)
    y = getattr(activation, f"triton_{name}")(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
