"""The dropout kernels in the interpreter: the very mask of the torch reference, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covering_array, label
from trimaran.kernels import dropout

SHAPES = [(1, 1, 1), (2, 3, 5), (2, 2, 16), (2, 2, 37), (0, 4, 8), (2, 0, 8), (2, 3, 0)]
WHERE = {"seed": 5, "site": "layers.3.mlp.output", "first_sample": 7, "first_position": 2, "seq_len": 9}


def inputs(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


LEVELS = {"shape": SHAPES, "dtype": [torch.float32, torch.float16], "name": ["dropout", "dropout_add"]}


@pytest.mark.parametrize("case", covering_array(LEVELS), ids=label)
def test_equals_the_reference(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    ops = (getattr(dropout, prefix + case["name"]) for prefix in ("triton_", ""))
    kernel, reference = (lambda *tensors, op=op: op(*tensors, 0.3, **WHERE) for op in ops)
    equals_reference(kernel, reference, inputs(1 + (case["name"] == "dropout_add"), *case["shape"]), case["dtype"])


def test_rate_zero() -> None:
    x, residual = inputs(2, 2, 3, 4)
    assert dropout.triton_dropout(x, 0.0, **WHERE) is x
    assert dropout.triton_dropout_add(x, residual, 0.0, **WHERE).equal(residual + x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("first_sample", [0, 2**31 - 1, 2**33])
def test_the_mask_is_the_references_at_any_sample_and_rate(first_sample: int, rate: float) -> None:
    x = torch.ones(2, 2, 20)
    where = {"seed": 1, "site": "a", "first_sample": first_sample, "first_position": 0, "seq_len": 2048}
    assert dropout.triton_dropout(x, rate, **where).equal(dropout.dropout(x, rate, **where))


def test_non_contiguous_input_and_gradient(equals_reference: Callable[..., None]) -> None:
    def transposed(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, r: op(x.transpose(0, 1), r.transpose(0, 1), 0.4, **WHERE).transpose(0, 1)

    equals_reference(
        transposed(dropout.triton_dropout_add), transposed(dropout.dropout_add), inputs(2, 5, 3, 18), torch.float32
    )


def test_a_residual_alone_may_want_a_gradient() -> None:
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8, requires_grad=True)
    dropout.triton_dropout_add(x, residual, 0.4, **WHERE).sum().backward()
    assert residual.grad is not None
    assert residual.grad.equal(torch.ones(2, 3, 8))
